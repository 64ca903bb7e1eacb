"""PyTorch's .bin, .pt and .pth files, without PyTorch and without running what they contain.

The format is a zip archive that is not compressed: `data.pkl`, a pickle of the tensors' shapes,
and `data/<key>`, each storage's bytes.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.mapped_file import MappedBytes, MappedFile
from mixtral_ms.checkpoint.formats.mapped_source import MappedSource, StoredTensor
from mixtral_ms.checkpoint.formats.tensor_source import (
    STORED_DTYPES,
    DamagedFileError,
    TensorInfo,
    carrier,
)
from mixtral_ms.errors import UserError

_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of the name and the extra field
_KEYS_SHOWN = 5


@dataclass(frozen=True)
class _Storage:
    dtype: str
    data: MappedBytes


@dataclass(frozen=True)
class _Tensor:
    """As the pickle gives it: offset and strides in elements, nothing checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class TorchZipSource(MappedSource):
    """The tensors of a file that `torch.save` wrote, or of one that was split into parts.

    Args:
        path_or_parts: the file, or its parts in order.

    Raises:
        UserError: it holds something else than tensors by name; or it is of PyTorch's format
            before 1.6.
        DamagedFileError: it is truncated or malformed.
        OSError: it cannot be read.
    """

    def __init__(self, path_or_parts: Path | Sequence[Path]) -> None:
        parts = [path_or_parts] if isinstance(path_or_parts, Path) else list(path_or_parts)
        path, file = parts[0], MappedFile(*parts)
        archive = _Archive(path, file)
        tensors = _state_dict(path, _unpickled(path, archive))
        stored = {name: _stored(path, name, tensor) for name, tensor in tensors.items()}
        super().__init__(path, file, stored)


class _Archive:
    """The records of the zip archive; names without the folder that they all are in."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path, self._file = path, file
        if file.bytes(0, len(_ZIP_START)).tobytes() != _ZIP_START:
            raise UserError(
                f"{path} is not in PyTorch's zip format (1.6 and later); if PyTorch can read it, "
                "save it again: python -c \"import torch; torch.save(torch.load('"
                f"{path.name}', map_location='cpu'), 'new-{path.name}')\""
            )
        try:
            with zipfile.ZipFile(_Reader(file)) as archive:
                entries = archive.infolist()
        except Exception as error:  # a damaged directory can raise anything
            raise DamagedFileError(
                f"{path} is truncated or damaged: its {file.size} bytes have no directory of the "
                f"zip archive at their end ({error})"
            ) from error
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "data.pkl" not in self._entries:
            raise UserError(f"{path} is a zip archive, but not one of torch.save: no data.pkl")
        order = self.record("byteorder") if "byteorder" in self._entries else None
        if order and (given := order.bytes(0, order.size).tobytes()) != b"little":
            raise UserError(f"{path} has byte order {given!r}; only b'little' is read")

    def record(self, name: str) -> MappedBytes:
        """A record's bytes, not copied."""
        entry = self._entries.get(name)
        if entry is None:
            raise DamagedFileError(f"{self.path} has no record {name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: its record {name} is compressed; torch.save never does")
        names = entry.header_offset + _LOCAL_HEADER.size
        if not 0 <= entry.header_offset <= names <= self._file.size:
            raise DamagedFileError(f"{self.path} has its record {name} outside of the file")
        head = self._file.bytes(entry.header_offset, names).tobytes()
        start = names + sum(_LOCAL_HEADER.unpack(head))
        if not head.startswith(_ZIP_START) or start + entry.file_size > self._file.size:
            raise DamagedFileError(f"{self.path}: its record {name} is not where it should be")
        return self._file.range(start, start + entry.file_size)


class _Reader(io.RawIOBase):
    """Mapped bytes as the file that zipfile wants."""

    def __init__(self, data: MappedBytes) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._data.size}[whence]
        )
        if self._at < 0:
            raise OSError("a position before the begin")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._data.bytes(self._at, self._at + len(buffer))
        buffer[: found.size] = found.data
        self._at += found.size
        return found.size


def _unpickled(path: Path, archive: _Archive) -> Any:
    text = archive.record("data.pkl")
    reader = _Unpickler(io.BytesIO(text.bytes(0, text.size).tobytes()), path, archive)
    try:
        return reader.load()
    except (UserError, DamagedFileError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedFileError(f"{path}: its data.pkl is damaged: {error!r}") from error


class _Unpickler(pickle.Unpickler):
    """Reads tensors and containers of them; runs nothing that a file could name."""

    def __init__(self, file: io.BytesIO, path: Path, archive: _Archive) -> None:
        super().__init__(file)
        self._path, self._archive = path, archive
        self._globals: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor_rebuilder(),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.storage", "UntypedStorage"): "uint8",
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            **{("torch", dtype): dtype for dtype in STORED_DTYPES},
        }

    def find_class(self, module: str, name: str) -> Any:
        """Only what a state dict is made of."""
        try:
            return self._globals[module, name]
        except KeyError:
            raise UserError(
                f"{self._path} names {module}.{name}, which is refused: reading it could run code. "
                "Only tensors by name are read; save them alone with torch.save(state_dict, ...)"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", type, key, device, number of elements)."""
        _, dtype, key, _, count = pid
        data = self._archive.record(f"data/{key}")
        if data.size != count * carrier(dtype).itemsize:
            raise DamagedFileError(
                f"{self._path}: storage {key} has {data.size} bytes, not {count} of {dtype}"
            )
        return _Storage(dtype, data)


def _tensor_rebuilder() -> Callable[..., _Tensor]:
    """A new function for every file: a pickle may set attributes of what it is given."""
    return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)


def _state_dict(path: Path, loaded: Any) -> dict[str, _Tensor]:
    """The one mapping of names to tensors: the whole, or the only such value of a dict."""
    if _is_state_dict(loaded):
        return loaded
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    inner = [value for value in loaded.values() if _is_state_dict(value)]
    if len(inner) == 1 and not any(isinstance(value, _Tensor) for value in loaded.values()):
        return inner[0]
    others = [f"{key!r} ({_kind(value)})" for key, value in loaded.items()]
    others = [text for text in others if not text.endswith("(tensor)")] or others
    shown = ", ".join(others[:_KEYS_SHOWN])
    more = f" and {len(others) - _KEYS_SHOWN} more" if len(others) > _KEYS_SHOWN else ""
    raise UserError(
        f"{path} is not one mapping of names to tensors: its keys are {shown}{more}; "
        "save the tensors alone with torch.save(state_dict, ...)"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in value.items())
    )


def _kind(value: Any) -> str:
    if isinstance(value, _Tensor):
        return "tensor"
    return "state dict" if _is_state_dict(value) else type(value).__name__


def _stored(path: Path, name: str, tensor: _Tensor) -> StoredTensor:
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    whole = all(isinstance(n, int) and n >= 0 for n in numbers)
    if not isinstance(tensor.storage, _Storage) or not whole:
        raise DamagedFileError(f"{path}: tensor {name!r} has no valid storage, shape and strides")
    if len(tensor.shape) != len(tensor.strides):
        raise DamagedFileError(f"{path}: tensor {name!r} has other strides than axes")
    last = tensor.offset + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    size = carrier(tensor.storage.dtype).itemsize
    if 0 not in tensor.shape and (last + 1) * size > tensor.storage.data.size:
        raise DamagedFileError(f"{path}: tensor {name!r} reaches beyond its storage")
    return StoredTensor(
        TensorInfo(tuple(tensor.shape), tensor.storage.dtype),
        tensor.storage.data,
        tensor.offset * size,
        tuple(step * size for step in tensor.strides),
    )
