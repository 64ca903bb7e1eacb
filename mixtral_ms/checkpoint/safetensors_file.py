"""Safetensors files, written in one pass with a hash of every tensor, read lazily.

The library's own `save_file` is not used for writing: it copies all tensors to bytes first
(twice the model in memory), and its release 0.8.0 ignores strides, so that a transposed
array is stored wrong without an error. Reading goes through the library.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

_DTYPE_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, u64
_LARGEST_HEADER = 100 << 20  # the library's own bound


@dataclass(frozen=True)
class TensorEntry:
    """What the manifest knows of one tensor; `start` and `size` are bytes in the file."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows of one file; the tensors start right after the header."""

    size: int
    header_size: int
    header_sha256: str
    tensors: dict[str, TensorEntry]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> FileEntry:
    """Write `tensors` to `path`, flush it to disk and return the hashes of what was written.

    Args:
        path: file to create.
        tensors: name -> array of any shape and strides; dtype one of float32, float16,
            bfloat16, int64, int32, uint8, bool.
        metadata: the file's `__metadata__`; MindSpore wants {"format": "ms"}.

    Raises:
        ValueError: a dtype that is not supported, with the tensor's name.
        OSError: the disk is full or cannot be written.
    """
    for name, array in tensors.items():
        if array.dtype.name not in _DTYPE_CODES or not array.dtype.isnative:
            allowed = ", ".join(_DTYPE_CODES)
            raise ValueError(
                f"tensor {name!r} has dtype {array.dtype}; a checkpoint holds {allowed}"
            )
    # Widest elements first: every tensor is then aligned for a reader that maps the file.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header = _header_bytes(order, tensors, metadata)
    entries = {}
    with open(path, "wb") as file:
        file.write(header)
        for name in order:
            # asarray, not ascontiguousarray: the latter turns a scalar into a vector
            array = np.asarray(tensors[name], order="C")
            data = memoryview(array.reshape(-1).view(np.uint8))
            entries[name] = TensorEntry(
                array.shape,
                array.dtype.name,
                file.tell(),
                data.nbytes,
                hashlib.sha256(data).hexdigest(),
            )
            file.write(data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, len(header), hashlib.sha256(header).hexdigest(), entries)


def _header_bytes(
    order: list[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        array = tensors[name]
        header[name] = {
            "dtype": _DTYPE_CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_names(path: str | os.PathLike[str]) -> set[str] | None:
    """Names of the tensors that a file's header lists; None when it cannot be read."""
    with open(path, "rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            return None
        (length,) = struct.unpack("<Q", prefix)
        if length > _LARGEST_HEADER:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    return set(header) - {"__metadata__"} if isinstance(header, dict) else None


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one file: name -> array, each read when asked for and not kept."""

    def __init__(self, path: str | os.PathLike[str], entry: FileEntry) -> None:
        self.path = Path(path)
        self._entry = entry
        if any(tensor.dtype == "bfloat16" for tensor in entry.tensors.values()):
            import mindspore  # noqa: F401, PLC0415 - registers numpy's bfloat16
        self._file = safe_open(self.path, framework="np")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entry.tensors:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry.tensors)

    def __len__(self) -> int:
        return len(self._entry.tensors)
