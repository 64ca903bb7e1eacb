"""PyTorch's files: read like torch.load reads them, and nothing in them is run."""

import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError
from mixtral_ms.checkpoint.formats.torch_format import TorchZipSource
from mixtral_ms.errors import UserError

torch.manual_seed(0)
BASE = torch.randn(12, 8)
TENSORS = {
    "f32": BASE,
    "transposed": BASE.T,
    "slice": BASE[3:9, 2:7],
    "strided": BASE[::3, 1::2],
    "expanded": BASE[0].expand(4, 8),
    "f16": BASE.half(),
    "bf16": BASE.bfloat16(),
    "f64": torch.randn(3).double(),
    "i64": torch.arange(9),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
}


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(source, tensors):
    assert list(source.infos) == list(tensors)
    for name, tensor in tensors.items():
        info, array = source.infos[name], source.read(name)
        assert info.shape == array.shape == tuple(tensor.shape)
        assert f"torch.{info.dtype}" == str(tensor.dtype)
        assert array.tobytes() == raw(tensor), name


def saved(path, what):
    torch.save(what, path)
    return path


def test_reads_what_pytorch_wrote(tmp_path):
    path = saved(tmp_path / "m.bin", TENSORS)
    source = TorchZipSource(path)
    assert_same(source, torch.load(path))
    region = (slice(1, 5), slice(2, 9))
    np.testing.assert_array_equal(source.read("transposed", region), BASE.T[region].numpy())


def test_modules_state_dict_and_one_inside_a_dict(tmp_path):
    module = torch.nn.Linear(4, 3)
    path = saved(tmp_path / "m.pt", module.state_dict())  # an OrderedDict with _metadata
    assert_same(TorchZipSource(path), module.state_dict())
    path = saved(tmp_path / "n.pt", {"model": module.state_dict(), "step": 3, "dtype": torch.half})
    assert_same(TorchZipSource(path), module.state_dict())


def split(path, folder, sizes):
    data, parts = path.read_bytes(), []
    for number, size in enumerate([*sizes, len(data)]):
        parts.append(folder / f"{path.name}-split{number}")
        parts[-1].write_bytes(data[:size])
        data = data[size:]
    return parts


def test_split_file_is_read_as_one(tmp_path):
    path = saved(tmp_path / "consolidated.00.pth", TENSORS)
    size = path.stat().st_size
    (tmp_path / "parts").mkdir()
    sizes = (size // 5 + 1, *[size // 14 + 3] * 10)  # 12 parts: 10 comes after 9, not after 1
    parts = split(path, tmp_path / "parts", sizes)
    assert_same(TorchZipSource(parts), TENSORS)
    for given in (parts[0].with_name(path.name), parts[0], parts[7]):
        assert_same(open_tensors(given), TENSORS)
    parts[1].unlink()
    with pytest.raises(UserError, match="consolidated.00.pth-split1 is missing"):
        open_tensors(parts[0])


def test_every_cut_is_found(tmp_path):
    path = saved(tmp_path / "m.bin", {"w": BASE})
    data = path.read_bytes()
    for length in range(4, len(data), 17):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match=rf"{path} is truncated .*{length} bytes"):
            TorchZipSource(path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("where", [Evil, lambda: {"w": BASE, "x": Evil()}])
def test_code_in_a_pickle_is_refused_by_name(tmp_path, where):
    path = saved(tmp_path / "m.bin", where())
    with pytest.raises(UserError, match=rf"{path} names __builtin__\.exec, which is refused"):
        TorchZipSource(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([BASE], "holds a list, not tensors by name"),
        ({}, "its keys are"),
        ({"w": BASE, "step": 3}, r"its keys are 'step' \(int\)"),
        ({"a": {"w": BASE}, "b": {"w": BASE}}, r"'a' \(state dict\), 'b' \(state dict\)"),
        ({"a": {"b": {"w": BASE}}}, r"its keys are 'a' \(dict\)"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, r"torch\.ComplexFloatStorage"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, what, message):
    path = saved(tmp_path / "m.bin", what)
    with pytest.raises(UserError, match=message):
        TorchZipSource(path)


def test_old_format_says_how_to_save_it_again(tmp_path):
    """The name of the file is not part of what is to be run: it could be a command itself."""
    old, new = tmp_path / "x'); import os; os.abort(); ('.pth", tmp_path / "new.bin"
    torch.save({"w": BASE}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"again in Python: ") as error:
        TorchZipSource(old)
    command = str(error.value).partition("in Python: ")[2]
    exec(command, {"torch": torch, "old": old, "new": new})  # what the user is told to run
    assert_same(TorchZipSource(new), {"w": BASE})


@pytest.mark.parametrize("view", [torch._neg_view(BASE), BASE.to(torch.complex64).conj().imag])
def test_a_lazy_negative_view_is_refused(tmp_path, view):
    """Its values are in the file with the other sign."""
    path = saved(tmp_path / "m.bin", {"w": BASE, "v": view})
    with pytest.raises(UserError, match=r"'v'.*resolve_neg|complex64|ComplexFloat"):
        open_tensors(path)


@pytest.mark.parametrize("storage", [0, 1])
def test_a_flipped_value_is_found_by_the_archives_sum(tmp_path, storage):
    path = saved(tmp_path / "m.bin", {"a": BASE, "b": BASE.half()})
    data = bytearray(path.read_bytes())
    values = raw([BASE, BASE.half()][storage])
    data[data.index(values) + 5] ^= 1
    path.write_bytes(data)
    source = open_tensors(path)
    source.read("ba"[storage])
    with pytest.raises(DamagedFileError, match=rf"data/{storage} was changed: .*CRC-32"):
        source.read("ab"[storage], (slice(0, 1), slice(0, 1)))


def test_an_archive_without_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.bin", {"w": BASE})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(open_tensors(path), {"w": BASE})


def memo(index):
    return b"\x80\x02}r" + index.to_bytes(4, "little") + b"."


@pytest.mark.parametrize(
    "pickled",
    [memo(2**27 - 1), memo(2**31 - 1), memo(2**32 - 1), b"\x80\x02}p134217727\n."]
    + [b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".", b"\x80\x02}]" + b"]" * 100_000],
)
def test_a_pickle_that_asks_for_memory_is_refused(tmp_path, pickled):
    path = rewritten(saved(tmp_path / "m.bin", {"w": BASE}), {"data.pkl": pickled})
    tracemalloc.start()
    with pytest.raises(UserError, match=r"m\.bin"):
        open_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_what_is_no_tensor_is_named_and_not_called_code(tmp_path):
    path = saved(tmp_path / "m.bin", {"w": BASE, "at": torch.device("cpu"), "size": BASE.shape})
    with pytest.raises(UserError, match="its keys are 'at'"):
        open_tensors(path)


@pytest.mark.parametrize("shape", [(10**9, 10**9), (1,) * 40])
def test_shapes_that_no_array_has_are_refused(tmp_path, shape):
    storage = torch.zeros(1)
    view = torch.as_strided(storage, shape, (0,) * len(shape))
    with pytest.raises(DamagedFileError, match=r"m\.bin: tensor 'w'"):
        open_tensors(saved(tmp_path / "m.bin", {"w": view}))


def rewritten(path, changes, compression=zipfile.ZIP_STORED):
    """The archive with some records replaced (None: left out)."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            new = changes.get(name.partition("/")[2], data)
            if new is not None:
                archive.writestr(name, new)
    return path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"byteorder": b"big"}, UserError, "byte order b'big'"),
        ({"data.pkl": None}, UserError, "not one of torch.save: no data.pkl"),
        ({"data/0": None}, DamagedFileError, "has no record data/0"),
        ({"data/0": bytes(100)}, DamagedFileError, "storage 0 has 100 bytes, not 96 of float32"),
        ({"data.pkl": b"\x80\x02}"}, DamagedFileError, "its data.pkl is damaged"),
        ({"data.pkl": pickle.dumps(3)}, UserError, "holds a int"),
    ],
)
def test_records_that_do_not_fit(tmp_path, changes, error, message):
    path = rewritten(saved(tmp_path / "m.bin", {"w": BASE}), changes)
    with pytest.raises(error, match=message):
        TorchZipSource(path)


def test_compressed_archive_is_refused(tmp_path):
    path = rewritten(saved(tmp_path / "m.bin", {"w": BASE}), {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        TorchZipSource(path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = saved(tmp_path / "m.bin", {"w": BASE[1:]})
    with zipfile.ZipFile(path) as archive:
        text = archive.read("m/data.pkl")
    assert text.count(b"K\x0bK\x08") == 1  # the shape (11, 8)
    rewritten(path, {"data.pkl": text.replace(b"K\x0bK\x08", b"K\x0cK\x08")})
    with pytest.raises(DamagedFileError, match="tensor 'w' reaches beyond its storage"):
        TorchZipSource(path)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_byte_of_the_framing_is_an_error_or_harmless(tmp_path, seed):
    """Never another exception than the two, whatever the bytes."""
    path = saved(tmp_path / "m.bin", {"w": BASE, "v": BASE.T})
    data, random = path.read_bytes(), np.random.default_rng(seed)
    refused = 0
    for index in random.integers(0, len(data), 300):
        changed = bytearray(data)
        changed[index] = random.integers(256)
        path.write_bytes(changed)
        try:
            source = TorchZipSource(path)
            for name in source.infos:
                source.read(name).sum()
        except (UserError, DamagedFileError):
            refused += 1
    assert refused
