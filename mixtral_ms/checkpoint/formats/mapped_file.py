"""Files as bytes in memory maps: views where possible, copies only across borders.

The parts of a split file (or the pieces of a tensor inside one) are one run of bytes without a
copy on disk.
"""

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError


class MappedBytes:
    """Parts of mapped files as one run of bytes, addressed from 0 to `size`.

    Args:
        parts: arrays of uint8, views of the maps; empty ones are left out.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if part.size]
        self._starts = [0, *accumulate(part.size for part in self.parts)]
        self.size = self._starts[-1]

    def range(self, start: int, stop: int) -> "MappedBytes":
        """The bytes from `start` to `stop`, not copied."""
        views = [
            part[max(0, start - begin) : max(0, stop - begin)]
            for part, begin in zip(self.parts, self._starts, strict=False)
        ]
        return MappedBytes(views)

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """uint8 array of the bytes from `start` to `stop`: a view inside one part, else a copy."""
        views = self.range(start, stop).parts
        return views[0] if len(views) == 1 else np.concatenate([np.empty(0, np.uint8), *views])

    def strided(
        self, offset: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray:
        """An array whose first element is at `offset`: a view inside one part, else a copy.

        Args:
            offset: bytes.
            dtype: of the elements; they need not be aligned.
            shape: of the array.
            strides: bytes from one index to the next, one an axis, not negative.

        Raises:
            ValueError: it reaches beyond the bytes.
        """
        if 0 in shape:
            return np.empty(shape, dtype)
        stop = offset + _extent(dtype, shape, strides)
        if not 0 <= offset <= stop <= self.size:
            raise ValueError(f"bytes {offset} to {stop} are asked of {self.size}")
        part = bisect_right(self._starts, offset) - 1
        if stop <= self._starts[part + 1]:
            begin = offset - self._starts[part]
            return np.ndarray(shape, dtype, self.parts[part], begin, strides)
        array = np.empty(shape, dtype)
        self._fill(array, offset, strides)
        return array

    def _fill(self, array: np.ndarray, offset: int, strides: tuple[int, ...]) -> None:
        """Copy into `array`, halved along its longest stretch until a half is inside one part."""
        extent = _extent(array.dtype, array.shape, strides)
        part = bisect_right(self._starts, offset) - 1
        if offset + extent <= self._starts[part + 1]:
            array[...] = self.strided(offset, array.dtype, array.shape, strides)
        elif extent == array.itemsize:  # a single element lies across the border
            array[...] = self.bytes(offset, offset + extent).view(array.dtype)[0]
        else:
            stretches = [(n - 1) * step for n, step in zip(array.shape, strides, strict=True)]
            axis = stretches.index(max(stretches))
            half = array.shape[axis] // 2
            first, second = np.split(array, [half], axis)
            self._fill(first, offset, strides)
            self._fill(second, offset + half * strides[axis], strides)

    def sha256(self) -> str:
        """Hex SHA-256 of all bytes."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.data)
        return digest.hexdigest()


def _extent(dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Bytes from the first element's begin to the last one's end."""
    return dtype.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


class MappedFile(MappedBytes):
    """One file, or several that are parts of one, in order.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, *paths: Path) -> None:
        self._maps = [(path, _map(path)) for path in paths]
        super().__init__([np.frombuffer(data, np.uint8) for _, data in self._maps if data])

    def require_whole(self) -> None:
        """Reading a mapped file that has shrunk would kill the process.

        Raises:
            DamagedFileError: a file is shorter than when it was opened.
        """
        for path, data in self._maps:
            if data and (size := data.size()) < len(data):
                raise DamagedFileError(
                    f"{path} was truncated while it was in use: {size} of {len(data)} bytes"
                )


def _map(path: Path) -> mmap.mmap | None:
    """The whole file; None for an empty one, which cannot be mapped."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return None
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
