"""Where the parts of one tensor are, as MindSpore's strategy files say it.

The ranks of a pipeline stage are a matrix; each axis of a tensor is cut over none, one or several
axes of that matrix. Ranks that then hold the same part are its replicas. An optimizer shard cuts
axis 0 of the part once more, over all replicas or over each run of n neighbouring ones.
"""

import math
from dataclasses import dataclass, replace

from mixtral_ms.errors import UserError

Region = tuple[slice, ...]
"""One slice an axis, with start and stop, step 1."""


@dataclass(frozen=True)
class Placement:
    """Where the parts of one tensor are, on the ranks of one pipeline stage.

    Raises:
        UserError: on creation, where no tensor can lie so.
    """

    dev_matrix: tuple[int, ...]
    """Sizes of the matrix of ranks; rank = first_rank + the row-major index."""
    tensor_map: tuple[tuple[int, ...], ...]
    """For each axis of the tensor the axes of dev_matrix that cut it, counted from the right, the
    major one first; () where the axis is whole."""
    opt_shard_size: int = 0
    """Over how many replicas the optimizer shard goes: 0 none, -1 all."""
    opt_shard_step: int = 0
    """Distance between the ranks of an optimizer shard; 0 means that there is none."""
    first_rank: int = 0
    """Of the stage."""

    def __post_init__(self) -> None:
        if not self.dev_matrix or min(self.dev_matrix) < 1:
            raise UserError(f"dev_matrix {list(self.dev_matrix)} must hold sizes of at least 1")
        used = [axis for axes in self.tensor_map for axis in axes]
        if len(set(used)) < len(used) or not set(used) <= set(range(len(self.dev_matrix))):
            raise UserError(
                f"tensor_map {[list(axes) for axes in self.tensor_map]} must name each of the "
                f"{len(self.dev_matrix)} axes of dev_matrix {list(self.dev_matrix)} at most once, "
                "counted from the right"
            )
        self._check_shard()

    @property
    def ranks(self) -> range:
        """The ranks of the stage."""
        return range(self.first_rank, self.first_rank + math.prod(self.dev_matrix))

    @property
    def cuts(self) -> tuple[int, ...]:
        """Into how many parts each axis goes, optimizer shard left out."""
        return tuple(math.prod(self._size(axis) for axis in axes) for axes in self.tensor_map)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same part, before the optimizer shard."""
        return math.prod(self.dev_matrix) // math.prod(self.cuts)

    @property
    def shards(self) -> int:
        """Into how many pieces the optimizer shard cuts a part; 1 where there is none."""
        if not self.tensor_map or not self.opt_shard_step or not self.opt_shard_size:
            return 1
        return self.replicas if self.opt_shard_size == -1 else self.opt_shard_size

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each rank's part of a tensor of global shape `shape`.

        Raises:
            UserError: an axis does not divide, or `shape` has another number of axes.
        """
        self._check_axes(shape)
        for axis, (length, parts) in enumerate(zip(shape, self._parts(), strict=True)):
            if length % parts:
                raise UserError(
                    f"axis {axis} of length {length} is not divisible by the {parts} parts it is "
                    "cut into"
                )
        return tuple(n // parts for n, parts in zip(shape, self._parts(), strict=True))

    def global_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of which each rank holds a part of `local_shape`.

        Raises:
            UserError: `local_shape` has another number of axes.
        """
        self._check_axes(local_shape)
        return tuple(n * parts for n, parts in zip(local_shape, self._parts(), strict=True))

    def region(self, shape: tuple[int, ...], rank: int) -> Region:
        """What `rank` holds of a tensor of global shape `shape`.

        Raises:
            UserError: an axis does not divide, or the rank is not one of the stage's.
        """
        local, index = self.local_shape(shape), self._part_index(rank)
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, local, strict=True))

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold what `rank` holds, itself among them, before the optimizer shard."""
        whole = replace(self, opt_shard_size=0, opt_shard_step=0)
        own = whole._part_index(rank)  # noqa: SLF001 - a placement of this class
        return tuple(one for one in self.ranks if whole._part_index(one) == own)  # noqa: SLF001

    def _part_index(self, rank: int) -> tuple[int, ...]:
        """Which part of each axis `rank` holds, optimizer shard included."""
        if rank not in self.ranks:
            raise UserError(
                f"rank {rank} is not one of the stage's ranks {self.ranks[0]} … {self.ranks[-1]}"
            )
        coordinate = _unravel(rank - self.first_rank, self.dev_matrix)
        index = [self._ravel(axes, coordinate) for axes in self.tensor_map]
        if self.shards > 1:  # neighbours in the order of ranks are neighbours in the shard
            replica = self._ravel(self._replica_axes(), coordinate)
            index[0] = index[0] * self.shards + replica % self.shards
        return tuple(index)

    def _parts(self) -> tuple[int, ...]:
        """Into how many parts each axis goes, optimizer shard included."""
        cuts = self.cuts
        return (cuts[0] * self.shards, *cuts[1:]) if cuts else ()

    def _size(self, axis: int) -> int:
        return self.dev_matrix[-1 - axis]

    def _ravel(self, axes: tuple[int, ...], coordinate: tuple[int, ...]) -> int:
        """Row-major index over some axes of dev_matrix, the major one first."""
        index = 0
        for axis in axes:
            index = index * self._size(axis) + coordinate[-1 - axis]
        return index

    def _replica_axes(self) -> tuple[int, ...]:
        """The axes of dev_matrix that cut no axis of the tensor, the major one first."""
        used = {axis for axes in self.tensor_map for axis in axes}
        return tuple(axis for axis in reversed(range(len(self.dev_matrix))) if axis not in used)

    def _check_axes(self, shape: tuple[int, ...]) -> None:
        if len(shape) != len(self.tensor_map):
            raise UserError(
                f"shape {tuple(shape)} has {len(shape)} axes, its layout has {len(self.tensor_map)}"
            )

    def _check_shard(self) -> None:
        """The shard takes whole axes of replicas from the right, then a divisor of the next one.

        MindSpore can express nothing else.
        """
        left = self.shards
        for axis in reversed(self._replica_axes()):
            size = self._size(axis)
            if left >= size and left % size == 0:
                left //= size
            elif left > 0 and size % left == 0:
                left = 1
            else:
                break
        if left != 1:
            raise UserError(
                f"opt_weight_shard_size {self.opt_shard_size} does not fit the {self.replicas} "
                f"replicas of a tensor cut as {[list(axes) for axes in self.tensor_map]} over "
                f"dev_matrix {list(self.dev_matrix)}"
            )


def _unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major coordinate of an index."""
    coordinate = []
    for size in reversed(sizes):
        index, along_axis = divmod(index, size)
        coordinate.append(along_axis)
    return tuple(reversed(coordinate))
