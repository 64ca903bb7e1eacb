"""Tensor sources whose values lie in mapped files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.mapped_file import MappedBytes, MappedFile
from mixtral_ms.checkpoint.formats.tensor_source import (
    DamagedFileError,
    Region,
    TensorInfo,
    TensorSource,
    carrier,
)

_MOST_AXES = 32  # numpy's, of every release


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's values are: `offset` and `strides` in bytes within `data`."""

    info: TensorInfo
    data: MappedBytes
    offset: int
    strides: tuple[int, ...]


def row_major_strides(info: TensorInfo) -> tuple[int, ...]:
    """Bytes from one index to the next, the last axis closest together."""
    strides = [carrier(info.dtype).itemsize]
    for length in reversed(info.shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))[-len(info.shape) :] if info.shape else ()


class MappedSource(TensorSource):
    """Tensors in a mapped file; a region inside one piece of it is read as a view."""

    def __init__(self, path: Path, file: MappedFile, tensors: Mapping[str, StoredTensor]) -> None:
        for name, tensor in tensors.items():
            _require_possible(path, name, tensor.info, file.size)
        self.path, self._file, self._tensors = path, file, tensors
        self.infos = {name: tensor.info for name, tensor in tensors.items()}

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource; the array may be unaligned in memory."""
        tensor = self._tensors[name]
        self._file.require_whole()
        shape, offset = tensor.info.shape, tensor.offset
        if region is not None:
            ends = [part.indices(n)[:2] for part, n in zip(region, shape, strict=True)]
            starts = [start for start, _ in ends]
            offset += sum(n * step for n, step in zip(starts, tensor.strides, strict=True))
            shape = tuple(max(0, stop - start) for start, stop in ends)
        return tensor.data.strided(offset, carrier(tensor.info.dtype), shape, tensor.strides)


def _require_possible(path: Path, name: str, info: TensorInfo, size: int) -> None:
    """Raises DamagedFileError for a shape that no array can have, or none out of this file."""
    if len(info.shape) > _MOST_AXES:
        raise DamagedFileError(
            f"{path}: tensor {name!r} has {len(info.shape)} axes, more than {_MOST_AXES}"
        )
    if info.nbytes > size:
        raise DamagedFileError(
            f"{path}: tensor {name!r} of shape {info.shape} would have {info.nbytes:,} bytes, the "
            f"whole file has {size:,}"
        )


class FramedSource(MappedSource):
    """A file of which every byte is either a tensor's value, in row-major order, or framing.

    Args:
        path: what the user named.
        file: its bytes.
        tensors: name -> what it is, and the ranges of bytes that hold it, in the file's order.
    """

    framing: MappedBytes
    """Everything that is not a tensor's value, in the file's order."""

    def __init__(
        self,
        path: Path,
        file: MappedFile,
        tensors: Mapping[str, tuple[TensorInfo, list[tuple[int, int]]]],
    ) -> None:
        stored = {
            name: StoredTensor(info, _joined(file, ranges), 0, row_major_strides(info))
            for name, (info, ranges) in tensors.items()
        }
        super().__init__(path, file, stored)
        ranges = [one for _, several in tensors.values() for one in several]
        stops, starts = [0, *(stop for _, stop in ranges)], [*(start for start, _ in ranges)]
        self.framing = _joined(file, zip(stops, [*starts, file.size], strict=True))

    def content(self, name: str) -> MappedBytes:
        """All bytes of a tensor."""
        return self._tensors[name].data


def _joined(file: MappedFile, ranges: Iterable[tuple[int, int]]) -> MappedBytes:
    return MappedBytes([part for start, stop in ranges for part in file.range(start, stop).parts])
