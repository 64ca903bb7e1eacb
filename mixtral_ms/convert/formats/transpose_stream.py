"""A tensor's values as a stream of pieces, in another layout than they were stored in."""

from collections.abc import Callable, Iterator

import numpy as np

from mixtral_ms.checkpoint.formats.regions import region_size, row_major_blocks
from mixtral_ms.checkpoint.formats.tensor_source import Region
from mixtral_ms.config.derived.parameter_row import Operation
from mixtral_ms.convert.formats.tensor_layouts import Slot

_TILE_ROWS = 32  # transposed 32 rows at a time: two to three times as fast as at once

Read = Callable[[Region], np.ndarray]


def stored_pieces(
    read: Read, source: Slot, op: Operation, *, head_dim: int, most: int
) -> Iterator[np.ndarray]:
    """An atom's values, piece by piece, in row-major order of how `op` stores it.

    Where source and target store it alike the pieces are what `read` gives: views, no copies.

    Args:
        read: reads a region of the tensor that holds the atom.
        source: where and how the atom is stored there.
        op: how the target stores it.
        head_dim: rows of a head, for the rotary order.
        most: values of a piece; more only where a row of the target, or a head, has more.
    """
    if source.op == op:
        yield from (read(block) for block in row_major_blocks(source.region, most))
    elif "transposed" in (source.op, op):
        yield from _transposed(read, source, most)
    else:
        yield from _rotary_order(read, source, most, head_dim)


def _transposed(read: Read, source: Slot, most: int) -> Iterator[np.ndarray]:
    rows, columns = source.shape
    *outer, all_columns = source.region
    step = max(1, most // rows)
    for start in range(0, columns, step):
        begin, end = start, min(start + step, columns)
        part = slice(all_columns.start + begin, all_columns.start + end)
        block = read((*outer, part)).reshape(rows, end - begin)
        turned = np.empty((end - begin, rows), block.dtype)
        for row in range(0, rows, _TILE_ROWS):
            turned[:, row : row + _TILE_ROWS] = block[row : row + _TILE_ROWS].T
        yield turned


def _rotary_order(read: Read, source: Slot, most: int, head_dim: int) -> Iterator[np.ndarray]:
    """Each head's rows from pairs to halves, or back."""
    rows, *rest = source.region
    width = region_size(tuple(rest))
    step = max(1, most // (head_dim * width)) * head_dim
    pairs = (head_dim // 2, 2) if source.op == "interleaved" else (2, head_dim // 2)
    for start in range(rows.start, rows.stop, step):
        block = read((slice(start, min(start + step, rows.stop)), *rest))
        yield block.reshape(-1, *pairs, width).swapaxes(1, 2).reshape(block.shape)
