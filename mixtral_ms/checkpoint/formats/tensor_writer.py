"""What every writer of tensors shares: values as checked chunks of bytes, and their hashes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from mixtral_ms.checkpoint.formats.tensor_source import OutgoingTensor, carrier

CHUNK_BYTES = 8 << 20
"""Small enough that what was just hashed or copied is still in the CPU's cache when written."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass(frozen=True)
class TensorEntry:
    """What the manifest knows of one tensor; `size` is in bytes."""

    shape: tuple[int, ...]
    dtype: str
    size: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows of one file; its header is all that is not a tensor's values."""

    size: int
    header_size: int
    header_sha256: str
    tensors: dict[str, TensorEntry]


def require_unique_names(tensors: Sequence[OutgoingTensor]) -> None:
    """Raises ValueError when two tensors of one file have the same name."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors are named {tensor.name!r}")
        seen.add(tensor.name)


class TensorWriter:
    """Writes one tensor's values; what is left open is found by `finish`.

    Args:
        file: open for writing.
        tensor: to be written.
        on_bytes: told of progress.

    Raises:
        ValueError: the pieces have another dtype than the tensor's carrier, or together other
            bytes than the tensor; the tensor is named.
    """

    def __init__(self, file: IO[bytes], tensor: OutgoingTensor, on_bytes: OnBytes | None) -> None:
        self._file, self._tensor, self._on_bytes = file, tensor, on_bytes
        self._digest = hashlib.sha256()
        self._chunks = _chunks(tensor)
        self._rest = memoryview(b"")

    def write(self, size: int) -> None:
        """Write the next `size` bytes."""
        while size:
            if not self._rest:
                self._rest = next(self._chunks)
            data, self._rest = self._rest[:size], self._rest[size:]
            self._digest.update(data)
            self._file.write(data)
            size -= len(data)
            if self._on_bytes:
                self._on_bytes(len(data))

    def finish(self) -> TensorEntry:
        """The tensor's entry, after all of its bytes were written."""
        for _ in self._chunks:  # raises if pieces are left over
            pass
        info = self._tensor.info
        return TensorEntry(info.shape, info.dtype, info.nbytes, self._digest.hexdigest())


def _chunks(tensor: OutgoingTensor) -> Iterator[memoryview]:
    """The values' bytes in row-major order, never more or fewer than the tensor has."""
    wanted, given = carrier(tensor.info.dtype), 0
    for piece in tensor.pieces():
        if piece.dtype != wanted:
            raise ValueError(
                f"tensor {tensor.name!r} is {tensor.info.dtype}: its pieces must be {wanted}, "
                f"one is {piece.dtype}"
            )
        given += piece.nbytes
        if given > tensor.info.nbytes:
            break
        for part in _contiguous(piece):
            yield part.reshape(-1).view(np.uint8).data
    if given != tensor.info.nbytes:
        raise ValueError(
            f"tensor {tensor.name!r} of shape {tensor.info.shape} has {tensor.info.nbytes} bytes, "
            f"its pieces {'at least ' if given > tensor.info.nbytes else ''}{given}"
        )


def _contiguous(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in row-major order, in contiguous parts of about CHUNK_BYTES."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, CHUNK_BYTES // array.itemsize)
        yield from (flat[start : start + step] for start in range(0, flat.size, step))
    elif array.nbytes <= CHUNK_BYTES:
        yield np.asarray(array, order="C")
    elif array[0].nbytes > CHUNK_BYTES:
        for row in array:
            yield from _contiguous(row)
    else:
        step = CHUNK_BYTES // array[0].nbytes
        for start in range(0, len(array), step):
            yield np.asarray(array[start : start + step], order="C")
