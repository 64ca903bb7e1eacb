"""Context parallel: a sequence split over ranks, each with neighbouring positions.

Legend: B batch, S positions of this rank, W of the whole sequence, K kv heads, d head_dim.
"""

from dataclasses import replace

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.attention import AttentionSizes, PlainRotaryAttention
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.collectives import GatherFromRanks
from mixtral_ms.parallel.grid.mesh import ProcessGroup


class ContextAttention(PlainRotaryAttention):
    """Attention of a rank's queries to the keys of all ranks, which are gathered.

    Ranks with later positions see more keys, and so have more to do.

    Args:
        group: the ranks that split the sequence.
        sizes: of this rank's part of the sequence.
    """

    def __init__(self, group: ProcessGroup, sizes: AttentionSizes) -> None:
        length = sizes.seq_length
        first = group.index * length
        super().__init__(replace(sizes, first=first, keys=group.size * length))
        self.positions_1S = Tensor(np.arange(first, first + length, dtype=np.int32)[None])
        self.gather_keys = GatherFromRanks(group, 2, partial=True)
        self.gather_segments = transports.all_gather(group)

    def own_positions(self, batch: int, positions_BS: Tensor | None) -> Tensor:
        """Counted over the whole sequence where none are given."""
        return ops.tile(self.positions_1S, (batch, 1)) if positions_BS is None else positions_BS

    def all_keys(self, x_BKSd: Tensor) -> Tensor:
        """(B, K, W, d)."""
        return self.gather_keys(x_BKSd)

    def all_segments(self, segment_ids_BS: Tensor | None) -> Tensor | None:
        """(B, W)."""
        if segment_ids_BS is None:
            return None
        parts = self.gather_segments(ops.cast(segment_ids_BS, mstype.float32))
        return ops.cast(ops.cat(ops.unbind(parts), 1), segment_ids_BS.dtype)
