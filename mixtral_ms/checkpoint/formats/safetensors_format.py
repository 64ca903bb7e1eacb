"""Safetensors files: written in one pass with a hash of every tensor, read through a map.

The library's own `save_file` is not used: it copies all tensors to bytes first (twice the model
in memory), and its release 0.8.0 ignores strides, so that a transposed array is stored wrong
without an error. MindSpore uses it, so an installed one that does so is refused here.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

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
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import decode_json

_DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, u64
_SHOWN_BYTES = 24
_LARGEST_HEADER = 100 << 20  # the library's own bound
_METADATA = "__metadata__"
_FEW_BITS = ("F8_", "F6_", "F4")


def installed_safetensors_is_safe() -> bool:
    """Whether the installed library stores a transposed array as what it is."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transposed.safetensors"
        safetensors.numpy.save_file({"transposed": array}, path)
        return path.read_bytes().endswith(array.tobytes())


def require_safe_library() -> None:
    """Raises UserError when the installed safetensors would corrupt what MindSpore saves."""
    if not installed_safetensors_is_safe():
        raise UserError(
            f"the installed safetensors {version('safetensors')} stores transposed arrays wrong "
            "without an error, and MindSpore saves and transforms checkpoints with it; run: "
            'pip install "safetensors<0.8"'
        )


require_safe_library()


class SafetensorsSource(FramedSource):
    """The tensors of a safetensors file.

    Args:
        path: the file.

    Raises:
        DamagedFileError: it is truncated, or its header does not describe its bytes.
        OSError: it cannot be read.
    """

    metadata: dict[str, str]
    """The header's `__metadata__`."""

    def __init__(self, path: Path) -> None:
        file = MappedFile(path)
        text = _header_text(path, file)
        header = _parsed_header(path, text)
        self.metadata = header.pop(_METADATA, {})
        start = _LENGTH_BYTES + len(text)
        tensors = {
            name: (info, [(start + begin, start + end)])
            for name, info, begin, end in _checked_entries(path, header)
        }
        size = max([start, *(stop for _, [(_, stop)] in tensors.values())])
        if file.size < size:
            raise DamagedFileError(f"{path} is truncated: {file.size} of {size} bytes")
        if file.size > size:
            raise DamagedFileError(f"{path} has {file.size} bytes, its header describes {size}")
        super().__init__(path, file, tensors)


def _header_text(path: Path, file: MappedFile) -> bytes:
    if file.size < _LENGTH_BYTES:
        raise DamagedFileError(
            f"{path} is truncated: it has {file.size} bytes, the length of the header alone 8"
        )
    (length,) = struct.unpack("<Q", file.bytes(0, _LENGTH_BYTES).data)
    if length > _LARGEST_HEADER:
        shown = min(_SHOWN_BYTES, file.size)
        raise DamagedFileError(
            f"{path} is no safetensors file: it begins with {file.bytes(0, shown).tobytes()!r}"
        )
    if file.size < _LENGTH_BYTES + length:
        raise DamagedFileError(
            f"{path} is truncated: {file.size} bytes, its header ends at {_LENGTH_BYTES + length}"
        )
    return file.bytes(_LENGTH_BYTES, _LENGTH_BYTES + length).tobytes()


def _parsed_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = decode_json(text.decode())
    except ValueError as error:
        raise DamagedFileError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedFileError(f"{path}: its header is not a JSON object")
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedFileError(f"{path}: its header's {_METADATA} does not map text to text")
    return header


def _checked_entries(path: Path, header: dict[str, Any]) -> list[tuple[str, TensorInfo, int, int]]:
    """(name, info, begin, end) in the order of the bytes, without holes and overlaps."""
    entries = [(name, *_checked_entry(path, name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[2:])
    at = 0
    for name, _, begin, end in entries:
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise DamagedFileError(f"{path}: tensor {name!r} begins at {begin}, not {at}: {what}")
        at = end
    return entries


def _checked_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedFileError(
            f"{path}: tensor {name!r} has no dtype, shape and data_offsets in the header"
        ) from error
    if isinstance(code, str) and code.startswith(_FEW_BITS):
        raise UserError(
            f"{path}: tensor {name!r} is {code}, numbers of 8 bits or fewer: these weights are "
            "quantised. Give the release in 16 bits, or dequantise them first"
        )
    if not isinstance(code, str) or code not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise DamagedFileError(f"{path}: tensor {name!r} has dtype {code!r}; known are {known}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in (*shape, begin, end)):
        raise DamagedFileError(
            f"{path}: tensor {name!r} has shape {shape!r} and offsets {begin!r} to {end!r}"
        )
    info = TensorInfo(tuple(shape), _DTYPES[code])
    if end - begin != info.nbytes:
        raise DamagedFileError(
            f"{path}: tensor {name!r} of shape {info.shape} and dtype {code} needs {info.nbytes} "
            f"bytes, its offsets give it {end - begin}"
        )
    return info, begin, end


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[OutgoingTensor],
    metadata: Mapping[str, str],
    on_bytes: OnBytes | None = None,
) -> FileEntry:
    """Write `tensors` to `path`, flush it to disk and return the hashes of what was written.

    Args:
        path: file to create.
        tensors: kept in order, except that wider elements come first.
        metadata: the file's `__metadata__`; MindSpore wants {"format": "ms"}, Hugging Face "pt".
        on_bytes: told of progress.

    Raises:
        ValueError: two tensors of one name, or pieces that are not the tensor they belong to.
        OSError: the disk is full or cannot be written.
    """
    require_unique_names(tensors)
    # Widest elements first: every tensor is then aligned for a reader that maps the file.
    ordered = sorted(tensors, key=lambda tensor: -carrier(tensor.info.dtype).itemsize)
    header = _header_bytes(ordered, metadata)
    entries = {}
    with open(path, "wb") as file:
        file.write(header)
        for tensor in ordered:
            writer = TensorWriter(file, tensor, on_bytes)
            writer.write(tensor.info.nbytes)
            entries[tensor.name] = writer.finish()
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, len(header), hashlib.sha256(header).hexdigest(), entries)


def _header_bytes(tensors: Sequence[OutgoingTensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {_METADATA: dict(metadata)}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_CODES[tensor.info.dtype],
            "shape": list(tensor.info.shape),
            "data_offsets": [start, start + tensor.info.nbytes],
        }
        start += tensor.info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text
