"""Tensors that stay on disk until they are read: the one view of every checkpoint format.

A source maps names to shapes and dtypes and reads any rectangular region of a tensor; a sink is
given tensors piece by piece. So nothing ever holds more than one piece of one tensor in memory.
bfloat16, which numpy does not have, travels as its bits in uint16.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Region

_CARRIERS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
STORED_DTYPES = tuple(_CARRIERS)


class DamagedFileError(UserError):
    """A file is not what its format says; the message names the file and, if known, the tensor."""


def carrier(dtype: str) -> np.dtype:
    """The numpy dtype in which values of `dtype` travel: itself, uint16 for bfloat16."""
    return _CARRIERS[dtype]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (a key of STORED_DTYPES) of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * carrier(self.dtype).itemsize


class TensorSource(ABC):
    """Named tensors on disk."""

    path: Path
    """What the user named: for messages."""
    infos: Mapping[str, TensorInfo]
    """Every tensor, in the order of the file."""

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """A tensor, or a region of it, in its carrier dtype.

        The array may be a read-only view of a mapped file: it costs memory only where it is
        touched, and the system takes that back when it needs it.

        Raises:
            KeyError: no tensor has that name.
            DamagedFileError: the file is not what it was when it was opened.
        """


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written: what it is, and its values in row-major order, piece by piece."""

    name: str
    info: TensorInfo
    pieces: Callable[[], Iterator[np.ndarray]]
    """Arrays in the carrier dtype whose values, one array after the other, are the tensor."""


def outgoing(name: str, array: np.ndarray, dtype: str | None = None) -> OutgoingTensor:
    """An array in memory as a tensor to be written.

    Args:
        name: of the tensor.
        array: of any shape and strides; MindSpore's own numpy bfloat16 is taken as its bits.
        dtype: where it is not the array's own: "bfloat16" for bits in uint16.

    Raises:
        ValueError: a dtype that no checkpoint holds, or that the array does not carry.
    """
    own = array.dtype.name
    if own == "bfloat16":
        array = array.view(np.uint16)
    dtype = dtype or own
    if dtype not in _CARRIERS or array.dtype != carrier(dtype):
        raise ValueError(
            f"tensor {name!r} has dtype {array.dtype}; a checkpoint holds "
            f"{', '.join(STORED_DTYPES)}"
        )
    return OutgoingTensor(name, TensorInfo(array.shape, dtype), lambda: iter((array,)))
