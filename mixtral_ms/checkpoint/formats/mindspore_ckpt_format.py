"""MindSpore's .ckpt files, without MindSpore and without holding a tensor in memory.

The file is a protobuf message, field numbers in parentheses:

    Checkpoint   value (1), repeated
    Value        tag (1): the tensor's name; tensor (2) | maptensor (3)
    TensorProto  dims (1), repeated; tensor_type (2); tensor_content (3)

A large tensor is several successive values of one tag and the same dims, whose contents joined
are the tensor. With `crc_check=True` MindSpore appends "crc_num" and ten bytes.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_ms.checkpoint.formats.mapped_file import MappedFile
from mixtral_ms.checkpoint.formats.mapped_source import FramedSource
from mixtral_ms.checkpoint.formats.tensor_source import (
    DamagedFileError,
    OutgoingTensor,
    TensorInfo,
    carrier,
)
from mixtral_ms.checkpoint.formats.tensor_writer import (
    FileEntry,
    OnBytes,
    TensorWriter,
    require_unique_names,
)

CKPT_PIECE_BYTES = 64 << 20
"""Most content of one value; a multiple of every element's size."""

_TYPE_NAMES = {
    "float32": "Float32",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "float64": "Float64",
    "int64": "Int64",
    "int32": "Int32",
    "int16": "Int16",
    "int8": "Int8",
    "uint8": "UInt8",
    "bool": "Bool",
}
_DTYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}
_TEXT = "str"  # tensor_type of a string that was saved as append_info
_VALUE = _TAG = _DIMS = 1
_TENSOR = _TYPE = 2
_MAP_TENSOR = _CONTENT = 3
_VARINT, _BYTES = 0, 2
_CRC_MARK, _CRC_BYTES = b"crc_num", 17
_LONGEST_VARINT = 10


class CkptSource(FramedSource):
    """The tensors of a .ckpt file; strings saved beside them as append_info are left out.

    A checksum that MindSpore appended is not compared: that would read the whole file.

    Args:
        path: the file.

    Raises:
        DamagedFileError: it is truncated or malformed; names the byte, and the tensor if known.
            Encrypted files and map parameters are not read either.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        file = MappedFile(path)
        if not file.size:
            raise DamagedFileError(f"{path} is truncated: it is empty")
        end = file.size
        if file.bytes(max(0, end - _CRC_BYTES), end).tobytes().startswith(_CRC_MARK):
            end -= _CRC_BYTES
        super().__init__(path, file, _joined_values(path, _values(_Wire(path, file), end)))


@dataclass(frozen=True)
class _Value:
    """One value of the file; the content is at `start` to `stop` in the file."""

    tag: str
    dims: tuple[int, ...]
    type_name: str
    start: int
    stop: int


def _joined_values(
    path: Path, values: Iterator[_Value]
) -> dict[str, tuple[TensorInfo, list[tuple[int, int]]]]:
    """Name -> its info and the ranges of its content."""
    tensors: dict[str, tuple[TensorInfo, list[tuple[int, int]]]] = {}
    before: _Value | None = None
    for value in values:
        if before is None or value.tag != before.tag:
            if value.tag in tensors:
                raise _damaged(path, value.start, f"a second tensor {value.tag!r}")
            tensors[value.tag] = (_info(path, value), [])
        elif (value.dims, value.type_name) != (before.dims, before.type_name):
            raise _damaged(
                path, value.start, f"pieces of tensor {value.tag!r} differ in shape or type"
            )
        tensors[value.tag][1].append((value.start, value.stop))
        before = value
    return {
        name: (_checked_info(path, name, info, ranges), ranges)
        for name, (info, ranges) in tensors.items()
    }


def _info(path: Path, value: _Value) -> TensorInfo:
    if value.type_name not in _DTYPES:
        raise DamagedFileError(
            f"{path}: tensor {value.tag!r} has type {value.type_name!r}; "
            f"known are {', '.join(_DTYPES)}"
        )
    if any(n < 0 for n in value.dims):
        raise _damaged(path, value.start, f"tensor {value.tag!r} has dims {value.dims}")
    return TensorInfo(value.dims, _DTYPES[value.type_name])


def _checked_info(
    path: Path, name: str, info: TensorInfo, ranges: list[tuple[int, int]]
) -> TensorInfo:
    size = sum(stop - start for start, stop in ranges)
    if info.shape == (0,) and size == carrier(info.dtype).itemsize:
        return TensorInfo((), info.dtype)  # how older releases store a scalar
    if size != info.nbytes:
        raise DamagedFileError(
            f"{path}: tensor {name!r} of shape {info.shape} and type {info.dtype} needs "
            f"{info.nbytes} bytes, the file has {size} of them"
        )
    return info


def _values(wire: "_Wire", end: int) -> Iterator[_Value]:
    """Every tensor's value, in the order of the file."""
    for field, start, stop in wire.fields(0, end):
        if field != _VALUE:
            raise _damaged(wire.path, start, "not a MindSpore checkpoint, or an encrypted one")
        fields = {number: (begin, end) for number, begin, end in wire.fields(start, stop)}
        if _TAG not in fields:
            raise _damaged(wire.path, start, "a value without a name")
        tag = wire.text(*fields[_TAG])
        if _MAP_TENSOR in fields:
            raise DamagedFileError(f"{wire.path}: {tag!r} is a map parameter, which is not read")
        if _TENSOR not in fields:
            raise _damaged(wire.path, start, f"the value {tag!r} holds no tensor")
        value = _value(wire, tag, *fields[_TENSOR])
        if value.type_name != _TEXT:
            yield value


def _value(wire: "_Wire", tag: str, start: int, stop: int) -> _Value:
    dims: list[int] = []
    parts: dict[int, tuple[int, int]] = {}
    for field, begin, end in wire.fields(start, stop):
        if field == _DIMS:
            dims.append(wire.signed(begin, end))
        else:
            parts[field] = begin, end
    if _TYPE not in parts or _CONTENT not in parts:
        raise _damaged(wire.path, start, f"tensor {tag!r} has no type or no content")
    return _Value(tag, tuple(dims), wire.text(*parts[_TYPE]), *parts[_CONTENT])


class _Wire:
    """Reads protobuf's wire format; contents are skipped, not read."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path, self._file = path, file

    def fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(field number, begin, end) of the fields of the message between `start` and `stop`.

        For a varint, begin and end are of its bytes, else of its contents.
        """
        at = start
        while at < stop:
            key, begin = self.varint(at, stop)
            kind = key & 7
            if kind == _VARINT:
                _, end = self.varint(begin, stop)
            elif kind == _BYTES:
                length, begin = self.varint(begin, stop)
                end = begin + length
            else:
                raise _damaged(self.path, at, f"a field of wire type {kind}")
            if end > stop:
                raise _damaged(
                    self.path, at, f"truncated: a field ends at byte {end}, {stop} are there"
                )
            yield key >> 3, begin, end
            at = end

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """The number at `at` and where the next thing begins."""
        value = 0
        data = self._file.bytes(at, min(stop, at + _LONGEST_VARINT)).tobytes()
        for count, byte in enumerate(data):
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value, at + count + 1
        raise _damaged(self.path, at, "truncated, or not a number")

    def signed(self, begin: int, end: int) -> int:
        """A varint field as an int64."""
        value, _ = self.varint(begin, end)
        return value - (1 << 64) if value >> 63 else value

    def text(self, begin: int, end: int) -> str:
        """A field's bytes as text."""
        try:
            return self._file.bytes(begin, end).tobytes().decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, begin, "a name that is not UTF-8") from error


def _damaged(path: Path, at: int, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged at byte {at}: {what}")


def write_ckpt(
    path: str | os.PathLike[str],
    tensors: Sequence[OutgoingTensor],
    on_bytes: OnBytes | None = None,
) -> FileEntry:
    """Write `tensors` as a .ckpt file, flush it to disk and return the hashes of what was written.

    `mindspore.load_checkpoint` reads it.

    Args:
        path: file to create.
        tensors: kept in order.
        on_bytes: told of progress.

    Raises:
        ValueError: two tensors of one name, or pieces that are not the tensor they belong to.
        OSError: the disk is full or cannot be written.
    """
    require_unique_names(tensors)
    framing, framing_size, entries = hashlib.sha256(), 0, {}
    with open(path, "wb") as file:
        for tensor in tensors:
            writer = TensorWriter(file, tensor, on_bytes)
            left = tensor.info.nbytes
            while True:
                size = min(left, CKPT_PIECE_BYTES)
                head = _value_head(tensor, size)
                file.write(head)
                framing.update(head)
                framing_size += len(head)
                writer.write(size)
                left -= size
                if not left:
                    break
            entries[tensor.name] = writer.finish()
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, framing_size, framing.hexdigest(), entries)


def _value_head(tensor: OutgoingTensor, content_size: int) -> bytes:
    """Everything of a value that comes before its content."""
    head = b"".join(_key(_DIMS, _VARINT) + _varint(n) for n in tensor.info.shape)
    head += _field(_TYPE, _TYPE_NAMES[tensor.info.dtype].encode())
    head += _key(_CONTENT, _BYTES) + _varint(content_size)
    tensor_size = len(head) + content_size
    head = _field(_TAG, tensor.name.encode()) + _key(_TENSOR, _BYTES) + _varint(tensor_size) + head
    return _key(_VALUE, _BYTES) + _varint(len(head) + content_size) + head


def _field(number: int, data: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(data)) + data


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
