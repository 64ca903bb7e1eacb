"""Safetensors files: read like the library reads them, refused where they are damaged."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixtral_ms.checkpoint.formats import safetensors_format as safetensors_file
from mixtral_ms.checkpoint.formats import tensor_writer as tensor_stream
from mixtral_ms.checkpoint.formats.mapped_file import MappedBytes
from mixtral_ms.checkpoint.formats.safetensors_format import (
    SafetensorsSource,
    installed_safetensors_is_safe,
    require_safe_library,
    write_safetensors,
)
from mixtral_ms.checkpoint.formats.tensor_source import (
    DamagedFileError,
    OutgoingTensor,
    TensorInfo,
    carrier,
    outgoing,
)
from mixtral_ms.checkpoint.store.manifest import verify_file
from mixtral_ms.errors import UserError

TORCH_TENSORS = {
    "f32": torch.randn(3, 5),
    "f16": torch.randn(4).half(),
    "bf16": torch.randn(2, 3, 4).bfloat16(),
    "f64": torch.randn(2).double(),
    "i64": torch.arange(7),
    "i32": torch.arange(3, dtype=torch.int32),
    "i16": torch.arange(3, dtype=torch.int16),
    "i8": torch.arange(3, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_reads_what_the_library_wrote(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file(TORCH_TENSORS, path, metadata={"format": "pt"})
    source = SafetensorsSource(path)
    assert source.metadata == {"format": "pt"}
    assert set(source.infos) == set(TORCH_TENSORS)
    for name, tensor in TORCH_TENSORS.items():
        info, array = source.infos[name], source.read(name)
        assert info == TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert (array.shape, array.dtype) == (info.shape, carrier(info.dtype))
        assert array.tobytes() == raw(tensor)


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "t.safetensors"
    listed = []
    for name, tensor in TORCH_TENSORS.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        array = np.frombuffer(raw(tensor), carrier(dtype)).reshape(tuple(tensor.shape))
        listed.append(outgoing(name, array, dtype))
    told = []
    entry = write_safetensors(path, listed, {"format": "pt"}, told.append)
    back = load_file(path)
    assert {name: raw(tensor) for name, tensor in back.items()} == {
        name: raw(tensor) for name, tensor in TORCH_TENSORS.items()
    }
    assert sum(told) == entry.size - entry.header_size == sum(t.info.nbytes for t in listed)
    assert verify_file(path, entry) == []
    widths = [carrier(info.dtype).itemsize for info in SafetensorsSource(path).infos.values()]
    assert widths == sorted(widths, reverse=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_region_is_what_numpy_slices(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    array = np.random.default_rng(1).random(shape, np.float32)
    region = []
    for length in shape:
        start = data.draw(st.integers(0, length))
        region.append(slice(start, data.draw(st.integers(start, length))))
    path = tmp_path / "t.safetensors"
    write_safetensors(path, [outgoing("before", np.ones(3)), outgoing("t", array)], {})
    got = SafetensorsSource(path).read("t", tuple(region))
    np.testing.assert_array_equal(got, array[tuple(region)], strict=True)


def test_a_region_is_a_read_only_view(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, [outgoing("t", np.zeros((8, 8), np.float32))], {})
    view = SafetensorsSource(path).read("t", (slice(2, 4), slice(1, 5)))
    assert not view.flags.owndata and not view.flags.writeable
    assert view.strides == (32, 4)


@pytest.mark.parametrize("chunk", [16, 100, 1 << 20])
def test_pieces_of_any_size_and_strides(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tensor_stream, "CHUNK_BYTES", chunk)
    array = np.arange(7 * 5 * 6, dtype=np.int32).reshape(6, 5, 7).transpose(2, 1, 0)
    pieces = OutgoingTensor(
        "t", TensorInfo(array.shape, "int32"), lambda: (array[i : i + 2] for i in range(0, 7, 2))
    )
    path = tmp_path / "t.safetensors"
    entry = write_safetensors(path, [pieces], {})
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["t"], array)
    assert verify_file(path, entry) == []


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([np.zeros(3, np.float32)], "tensor 'odd' of shape .* has 16 bytes, its pieces 12"),
        ([np.zeros(3, np.float32)] * 2, "tensor 'odd' .* 16 bytes, its pieces at least 24"),
        ([np.zeros(4, np.float32), np.zeros(1, np.float32)], "its pieces at least 20"),
        ([np.zeros(2, np.float64)], "tensor 'odd' is float32: .* one is float64"),
    ],
)
def test_pieces_that_are_not_the_tensor_are_refused(tmp_path, pieces, message):
    tensor = OutgoingTensor("odd", TensorInfo((4,), "float32"), lambda: iter(pieces))
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "t", [tensor], {})


def test_two_tensors_of_one_name_are_refused(tmp_path):
    one = outgoing("w", np.zeros(1))
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        write_safetensors(tmp_path / "t", [one, one], {})


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{x", "header is not JSON"),
        (b"\xff\xfe", "header is not JSON"),
        (b"[" * 100_000, "header is not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":1,"a":2}', "has 'a' twice"),
        ({"__metadata__": {"a": 1}}, "does not map text to text"),
        ({"a": 3}, "tensor 'a' has no dtype"),
        ({"a": entry(0, 8, [2], "F8")}, "tensor 'a' has dtype 'F8'; known are F"),
        ({"a": entry(0, 8, [-2])}, "tensor 'a' has shape"),
        ({"a": entry(0, 8, [2.0])}, "tensor 'a' has shape"),
        ({"a": entry(0, 8, [3])}, "tensor 'a' of shape .*needs 12 bytes, its offsets give it 8"),
        ({"a": entry(8, 0, [2])}, "its offsets give it -8"),
        ({"a": entry(4, 8, [1])}, "tensor 'a' begins at 4, not 0: leaves a hole"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, "tensor 'b' begins at 4.* overlaps"),
        ({"a": entry(0, 4, [1])}, "has .* bytes, its header describes"),
        ({"a": entry(0, 12, [3])}, r"is truncated: \d+ of \d+ bytes"),
    ],
)
def test_header_that_does_not_describe_the_file(tmp_path, header, message):
    path = header_file(tmp_path / "t.safetensors", header, bytes(8))
    with pytest.raises(DamagedFileError, match=rf"{path}.*{message}"):
        SafetensorsSource(path)


def test_header_order_need_not_be_the_order_of_the_bytes(tmp_path):
    header = {"b": entry(4, 8, [1]), "a": entry(0, 4, [1])}
    path = header_file(tmp_path / "t", header, np.array([1, 2], np.float32).tobytes())
    source = SafetensorsSource(path)
    assert list(source.infos) == ["a", "b"]
    assert (source.read("a")[0], source.read("b")[0]) == (1, 2)


def test_every_truncation_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, [outgoing("t", np.zeros(4, np.float32))], {})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match=f"is truncated: .*{length}"):
            SafetensorsSource(path)
    header_file(path, b"{}", length=1 << 60)
    with pytest.raises(DamagedFileError, match="is no safetensors file: it begins with"):
        SafetensorsSource(path)


def test_a_file_that_shrinks_while_it_is_read_does_not_kill(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, [outgoing("t", np.zeros(100_000, np.float32))], {})
    source = SafetensorsSource(path)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedFileError, match="truncated while it was in use: 1000 of"):
        source.read("t")


def test_a_name_that_is_not_there(tmp_path):
    write_safetensors(tmp_path / "t", [], {})
    with pytest.raises(KeyError, match="nothing"):
        SafetensorsSource(tmp_path / "t").read("nothing")


def test_library_that_ignores_strides_is_refused(monkeypatch):
    assert installed_safetensors_is_safe()
    original = safetensors.numpy.save_file

    def ignore_strides(tensors, path):
        stored = {n: a.T.reshape(-1).reshape(a.shape) for n, a in tensors.items()}
        original(stored, path)

    monkeypatch.setattr(safetensors_file.safetensors.numpy, "save_file", ignore_strides)
    assert not installed_safetensors_is_safe()
    with pytest.raises(UserError, match=r'safetensors 0\..*pip install "safetensors<0.8"'):
        require_safe_library()


@settings(max_examples=200)
@given(
    cuts=st.lists(st.integers(0, 96), max_size=6),
    starts=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 1)),
    order=st.permutations(range(3)),
)
def test_strided_reads_across_borders(cuts, starts, order):
    """Borders anywhere, inside elements too: as if the bytes were in one part."""
    whole = np.random.default_rng(2).integers(0, 256, 96, np.uint8)
    edges = [0, *sorted(cuts), 96]
    parts = MappedBytes([whole[a:b] for a, b in zip(edges, edges[1:], strict=False)])
    array = whole.view(np.int32).reshape(3, 4, 2)
    expected = array[tuple(slice(start, None) for start in starts)].transpose(order)
    offset = sum(a * b for a, b in zip(starts, array.strides, strict=True))
    got = parts.strided(offset, array.dtype, expected.shape, expected.strides)
    np.testing.assert_array_equal(got, expected, strict=True)
    np.testing.assert_array_equal(parts.bytes(5, 60), whole[5:60])
    with pytest.raises(ValueError, match="asked of 96"):
        parts.strided(offset + 96, array.dtype, (1,), (4,))
