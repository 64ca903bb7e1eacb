"""Context parallel: a sequence split over ranks, each with neighbouring positions.

Legend: B batch, S positions of this rank, W of the whole sequence, T = B * S tokens, K kv heads,
d head_dim, E experts, k experts a token.
"""

from dataclasses import replace

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.attention import AttentionSizes, PlainRotaryAttention
from mixtral_ms.model.dispatch import Dispatch
from mixtral_ms.parallel import transport
from mixtral_ms.parallel.collectives import GatherFromRanks
from mixtral_ms.parallel.mesh import ProcessGroup
from mixtral_ms.parallel.primitives import zeros_like


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
        self.gather_segments = transport.all_gather(group)

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


class DispatchOverRanks(nn.Cell):
    """As `Dispatch`, where several ranks share a batch.

    Every rank hands out the places of the whole batch, in its order, and reads off its own.

    Args:
        group: the ranks that split the sequence.
        shape: (B, S).
        whole: hands out places among all tokens.
        own: gives this rank's assignments that have a place their rows.
    """

    def __init__(
        self, group: ProcessGroup, shape: tuple[int, int], whole: Dispatch, own: Dispatch
    ) -> None:
        super().__init__()
        self.batch, self.length = shape
        self.index, self.size = group.index, group.size
        self.whole, self.own = whole, own
        self.gather = transport.all_gather(group)

    def construct(self, expert_Tk: Tensor, valid_Tk: Tensor) -> tuple:
        """As `Dispatch`; counts_E and taken_E are those of all ranks."""
        top_k = expert_Tk.shape[1]
        expert_all = self._of_all(ops.where(valid_Tk, expert_Tk, Tensor(-1, mstype.int32)), top_k)
        _, kept_all, _, _, counts_E, taken_E = self.whole(expert_all, expert_all >= 0)
        kept_all = ops.reshape(kept_all, (self.batch, self.size, self.length, top_k))
        kept_Tk = ops.reshape(kept_all[:, self.index], expert_Tk.shape)
        row_Tk, kept_Tk, assignment_R, sizes_e, _, _ = self.own(expert_Tk, kept_Tk)
        return row_Tk, kept_Tk, assignment_R, sizes_e, counts_E, taken_E

    def bprop(self, expert_Tk: Tensor, valid_Tk: Tensor, out: tuple, dout: tuple) -> tuple:
        """Places have no gradient."""
        return zeros_like(expert_Tk), zeros_like(valid_Tk)

    def _of_all(self, expert_Tk: Tensor, top_k: int) -> Tensor:
        """(B * W, k), the batch's rows one after another."""
        parts = self.gather(ops.cast(expert_Tk, mstype.float32))
        parts = ops.reshape(parts, (self.size, self.batch, self.length, top_k))
        whole = ops.transpose(parts, (1, 0, 2, 3))
        return ops.cast(ops.reshape(whole, (-1, top_k)), mstype.int32)
