"""PyTorch's .bin, .pt and .pth files, without PyTorch and without running what they contain.

The format is a zip archive that is not compressed: `data.pkl`, a pickle of the tensors' shapes,
and `data/<key>`, each storage's bytes.
"""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.mapped_file import MappedBytes, MappedFile
from mixtral_ms.checkpoint.formats.mapped_source import MappedSource, StoredTensor
from mixtral_ms.checkpoint.formats.tensor_source import (
    STORED_DTYPES,
    DamagedFileError,
    Region,
    TensorInfo,
    carrier,
)
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import PICKLE_KIND, kind_of, not_as_wanted

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
_METADATA_AT = 2  # of _rebuild_tensor_v2's arguments behind the strides
_WANTED = "a PyTorch file of weights"
_MEMO_PLACES = ("PUT", "BINPUT", "LONG_BINPUT")


@dataclass(frozen=True)
class _Storage:
    dtype: str
    data: MappedBytes
    record: str


@dataclass(frozen=True)
class _Tensor:
    """As the pickle gives it: offset and strides in elements, nothing checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    view: dict[str, Any]
    """Lazy operations that are not in the values: {"neg": True}, {"conj": True}."""


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
        self._archive = archive
        self._records = {name: tensor.storage.record for name, tensor in tensors.items()}

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource. The first read of a storage compares it with the archive's sum.

        Raises:
            DamagedFileError: it has another one.
        """
        self._archive.require_sum(self._records[name])
        return super().read(name, region)


def _no_zip(path: Path) -> UserError:
    """What a file is that does not begin as PyTorch's do."""
    kind = kind_of(path)
    if kind is PICKLE_KIND:
        return UserError(
            f"{path} is not in PyTorch's zip format (1.6 and later). Where you trust it, save it "
            "again in Python: torch.save(torch.load(old, map_location='cpu', weights_only=True), "
            "new)"
        )
    index = path.with_suffix(".idx")
    if kind is None and index.is_file():
        return UserError(
            f"{path} is a Megatron data set, whose index {index.name} lies beside it: it holds "
            "token ids, no weights"
        )
    return not_as_wanted(path, _WANTED, "it does not begin as PyTorch's files of 1.6 and later do")


class _Archive:
    """The records of the zip archive; names without the folder that they all are in."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path, self._file = path, file
        self._compared: set[str] = set()
        if file.bytes(0, len(_ZIP_START)).tobytes() != _ZIP_START:
            raise _no_zip(path)
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

    def require_sum(self, name: str) -> None:
        """Compare a record with the checksum that the archive has of it, once.

        PyTorch can be told to compute none, and writes 0 then.

        Raises:
            DamagedFileError: it is another one.
        """
        if name in self._compared or not (saved := self._entries[name].CRC):
            return
        found = 0
        for part in self.record(name).parts:
            found = zlib.crc32(part.data, found)
        if found != saved:
            raise DamagedFileError(
                f"{self.path}: its record {name} was changed: it has the CRC-32 {found:08x}, the "
                f"archive says {saved:08x}"
            )
        self._compared.add(name)


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
    record = archive.record("data.pkl")
    archive.require_sum("data.pkl")
    text = record.bytes(0, record.size).tobytes()
    try:
        _require_small(text)
        return _Unpickler(io.BytesIO(text), path, archive).load()
    except (UserError, DamagedFileError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedFileError(f"{path}: its data.pkl is damaged: {error!r}") from error


def _require_small(text: bytes) -> None:
    """Raises ValueError for a pickle that asks for more memory than its own size warrants.

    The place of a memo is as large as its highest index, and a length may stand before nothing.
    """
    for opcode, argument, _ in pickletools.genops(text):
        if opcode.name in _MEMO_PLACES and int(argument or 0) > len(text):
            raise ValueError(f"{opcode.name} {argument} in {len(text)} bytes")


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
            ("torch", "device"): _Harmless,
            ("torch", "Size"): _Harmless,
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
        return _Storage(dtype, data, f"data/{key}")


class _Harmless:
    """Stands for a value that is no tensor, so that the message can name its key."""

    def __init__(self, *_: Any) -> None:
        pass


def _tensor_rebuilder() -> Callable[..., _Tensor]:
    """A new function for every file: a pickle may set attributes of what it is given."""

    def rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> _Tensor:
        changed = others[_METADATA_AT:] and others[_METADATA_AT]
        return _Tensor(storage, offset, shape, strides, dict(changed or {}))

    return rebuild


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
    if lazy := [name for name, on in tensor.view.items() if on]:
        raise UserError(
            f"{path}: tensor {name!r} is a lazy view ({', '.join(map(str, lazy))}), whose values "
            "are not in the file as they are: save tensor.resolve_neg().resolve_conj()"
        )
    sized = isinstance(tensor.shape, list | tuple) and isinstance(tensor.strides, list | tuple)
    numbers = (tensor.offset, *tensor.shape, *tensor.strides) if sized else (None,)
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
