""".ckpt files: exchanged with MindSpore's own save and load, refused where they are damaged."""

import contextlib

import mindspore as ms
import numpy as np
import pytest
from mindspore.train import serialization
from mindspore.train.checkpoint_pb2 import Checkpoint

from mixtral_ms.checkpoint.formats import mindspore_ckpt_format as ckpt_file
from mixtral_ms.checkpoint.formats.mindspore_ckpt_format import CkptSource, write_ckpt
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError, TensorInfo, outgoing
from mixtral_ms.checkpoint.store.manifest import verify_file

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "f32": RANDOM.random((30, 7), np.float32),
    "f16": RANDOM.random(5).astype(np.float16),
    "f64": RANDOM.random(3),
    "i64": np.arange(4),
    "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
    "i16": np.arange(6, dtype=np.int16),
    "i8": np.arange(6, dtype=np.int8),
    "u8": np.arange(200, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(7, np.int64),
    "bf16": np.linspace(-3, 3, 24, dtype=np.float32).astype("bfloat16").reshape(4, 6),
}


def save_with_mindspore(path, arrays, **options):
    listed = [{"name": name, "data": ms.Tensor(array)} for name, array in arrays.items()]
    ms.save_checkpoint(listed, str(path), **options)
    path.chmod(0o644)
    return path


def assert_same(source, arrays):
    assert list(source.infos) == list(arrays)
    for name, array in arrays.items():
        assert source.infos[name] == TensorInfo(array.shape, array.dtype.name)
        assert source.read(name).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("crc_check", [False, True])
def test_reads_what_mindspore_wrote(tmp_path, crc_check):
    path = save_with_mindspore(tmp_path / "m.ckpt", ARRAYS, crc_check=crc_check)
    assert_same(CkptSource(path), ARRAYS)


def test_reads_pieces_that_mindspore_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KB
    wide = np.linspace(-3, 3, 1500, dtype=np.float32).reshape(3, 500)
    arrays = {"f32": wide, "bf16": wide.astype("bfloat16")}
    path = save_with_mindspore(tmp_path / "m.ckpt", arrays)
    message = Checkpoint()
    message.ParseFromString(path.read_bytes())
    assert len(message.value) == 6 + 3, "MindSpore did not cut them"
    assert_same(CkptSource(path), arrays)


def test_strings_of_append_info_are_left_out(tmp_path):
    path = save_with_mindspore(
        tmp_path / "m.ckpt", {"w": ARRAYS["f32"]}, append_dict={"epoch": 3, "note": "hello"}
    )
    source = CkptSource(path)
    assert set(source.infos) == {"w", "epoch"}
    assert (source.read("epoch"), source.infos["epoch"].shape) == (3, ())


@pytest.mark.parametrize("piece", [8, 64, 1 << 20])
def test_mindspore_reads_what_is_written(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(ckpt_file, "CKPT_PIECE_BYTES", piece)
    path, told = tmp_path / "m.ckpt", []
    entry = write_ckpt(path, [outgoing(n, a) for n, a in ARRAYS.items()], told.append)
    loaded = ms.load_checkpoint(str(path))
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        back = loaded[name].asnumpy()
        assert (back.dtype, back.shape) == (array.dtype, array.shape), name
        assert back.tobytes() == array.tobytes(), name
    assert_same(CkptSource(path), ARRAYS)
    assert verify_file(path, entry) == []
    assert sum(told) == entry.size - entry.header_size == sum(a.nbytes for a in ARRAYS.values())
    message = Checkpoint()
    message.ParseFromString(path.read_bytes())
    assert max(len(value.tensor.tensor_content) for value in message.value) <= max(piece, 8)


def test_regions_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt_file, "CKPT_PIECE_BYTES", 40)
    write_ckpt(tmp_path / "m.ckpt", [outgoing("w", ARRAYS["f32"])])
    source = CkptSource(tmp_path / "m.ckpt")
    for rows in (slice(0, 30), slice(3, 4), slice(7, 21), slice(5, 5)):
        for columns in (slice(0, 7), slice(2, 3), slice(1, 6)):
            expected = ARRAYS["f32"][rows, columns]
            np.testing.assert_array_equal(source.read("w", (rows, columns)), expected, strict=True)


def test_empty_tensors_and_old_scalars(tmp_path):
    path = tmp_path / "m.ckpt"
    arrays = {"none": np.zeros((0, 3), np.float32), "flat": np.zeros(0, np.int64)}
    write_ckpt(path, [outgoing(n, a) for n, a in arrays.items()])
    assert_same(CkptSource(path), arrays)
    path.write_bytes(value("s", [0], "Float32", np.float32(2.5).tobytes()))
    assert CkptSource(path).infos["s"].shape == ()
    assert CkptSource(path).read("s") == np.float32(2.5)


def value(tag, dims, kind, content):
    message = Checkpoint()
    one = message.value.add()
    one.tag, one.tensor.tensor_type, one.tensor.tensor_content = tag, kind, content
    one.tensor.dims.extend(dims)
    return message.SerializeToString()


def map_parameter():
    message = Checkpoint()
    one = message.value.add()
    one.tag = "table"
    tensor = one.maptensor.tensor.add()
    tensor.dims.append(1)
    tensor.tensor_type, tensor.tensor_content = "int32", bytes(4)
    return message.SerializeToString()


WHOLE = value("w", [2], "Float32", bytes(8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated: it is empty"),
        (WHOLE[:-1], r"at byte 0: truncated: a field ends at byte 28, 27 are there"),
        (WHOLE + WHOLE[:5], r"at byte 28: truncated"),
        (WHOLE + b"\x0a", r"at byte 29: truncated, or not a number"),
        (b"\x0b" + WHOLE, "at byte 0: a field of wire type 3"),
        (b"\x12" + WHOLE[1:], "at byte 2: not a MindSpore checkpoint, or an encrypted one"),
        (b"\x0a" + b"\xff" * 20, "at byte 1: truncated, or not a number"),
        (b"\x0a\x00", "a value without a name"),
        (b"\x0a\x03\x0a\x01w", "the value 'w' holds no tensor"),
        (b"\x0a\x03\x0a\x01\xff", "a name that is not UTF-8"),
        (b"\x0a\x05\x0a\x01w\x12\x00", "tensor 'w' has no type or no content"),
        (map_parameter(), "'table' is a map parameter, which is not read"),
        (value("w", [3], "Float32", bytes(8)), "'w' of shape .*needs 12 bytes, the file has 8"),
        (value("w", [2], "Complex64", bytes(16)), "'w' has type 'Complex64'; known are Float32"),
        (value("w", [-2], "Float32", bytes(8)), r"tensor 'w' has dims \(-2,\)"),
        (WHOLE + value("v", [], "Bool", b"\1") + WHOLE, "a second tensor 'w'"),
        (WHOLE + value("w", [4], "Float32", bytes(8)), "pieces of tensor 'w' differ"),
    ],
)
def test_damage_is_named(tmp_path, data, message):
    path = tmp_path / "m.ckpt"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=rf"{path}.*{message}"):
        CkptSource(path)


def test_every_truncation_is_found_unless_at_a_borderline_and_then_by_the_entry(tmp_path):
    path = tmp_path / "m.ckpt"
    arrays = {name: ARRAYS[name] for name in ("f16", "bf16", "scalar")}
    entry = write_ckpt(path, [outgoing(n, a) for n, a in arrays.items()])
    data = path.read_bytes()
    quiet = []
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert verify_file(path, entry) == [f"{path} is truncated: {length} of {len(data)} bytes"]
        with contextlib.suppress(DamagedFileError):
            quiet.append(len(CkptSource(path).infos))
    assert quiet == [1, 2]  # the format cannot tell: only whole tensors are left


def test_every_flipped_bit_is_found_by_the_entry(tmp_path):
    path = tmp_path / "m.ckpt"
    arrays = {name: ARRAYS[name] for name in ("f16", "bf16", "scalar")}
    entry = write_ckpt(path, [outgoing(n, a) for n, a in arrays.items()])
    data = path.read_bytes()
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        assert verify_file(path, entry), f"byte {index}"
    changed = bytearray(data)
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert verify_file(path, entry, "rank_0/m.ckpt") == [
        "rank_0/m.ckpt: tensor scalar was changed: its hash is not the manifest's"
    ]
    path.write_bytes(data + b"x")
    assert verify_file(path, entry) == [f"{path} has {len(data) + 1} bytes, {len(data)} were saved"]
