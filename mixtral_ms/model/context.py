"""Context parallel: a sequence split over ranks, each with neighbouring positions.

Legend: B batch, S positions of this rank, W of the whole sequence, T = B * S tokens, H heads,
K kv heads, d head_dim, E experts, k experts a token.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.attention import CausalAttention
from mixtral_ms.kernels.elementwise import apply_rotary, tables_at
from mixtral_ms.model.dispatch import Dispatch
from mixtral_ms.parallel import transport
from mixtral_ms.parallel.collectives import GatherFromRanks
from mixtral_ms.parallel.mesh import ProcessGroup


def attention_over_ranks(group: ProcessGroup) -> Callable[..., nn.Cell]:
    """A builder of attention as `KernelChoice.attention` is one."""
    return partial(ContextAttention, group)


class ContextAttention(nn.Cell):
    """Attention of a rank's queries to the keys of all ranks, which are gathered.

    Ranks with later positions see more keys, and so have more to do.

    Args:
        group: the ranks that split the sequence.
        seq_length: S.
        num_heads, n_kv_heads, head_dim, window, softmax_dtype: as `CausalAttention`.
    """

    def __init__(  # noqa: PLR0913 - the sizes of attention
        self,
        group: ProcessGroup,
        seq_length: int,
        num_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        softmax_dtype: mstype.Type = mstype.float32,
    ) -> None:
        super().__init__()
        self.num_heads, self.n_kv_heads, self.head_dim = num_heads, n_kv_heads, head_dim
        first = group.index * seq_length
        self.positions_1S = Tensor(np.arange(first, first + seq_length, dtype=np.int32)[None])
        self.attend = CausalAttention(
            seq_length,
            num_heads,
            n_kv_heads,
            head_dim,
            window,
            softmax_dtype,
            first=first,
            keys=group.size * seq_length,
        )
        self.whole = GatherFromRanks(group, 2, partial=True)
        self.gather_segments = transport.all_gather(group)

    def construct(  # noqa: PLR0913 - the inputs of attention
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_Pd: Tensor,
        sin_Pd: Tensor,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """As `attention.PlainRotaryAttention`, all of them this rank's part."""
        batch, length, width = q.shape
        if positions_BS is None:
            positions_BS = ops.tile(self.positions_1S, (batch, 1))
        cos, sin = tables_at(cos_Pd, sin_Pd, positions_BS)
        q_BHSd = apply_rotary(self._heads(q, self.num_heads), cos, sin)
        k_BKWd = self.whole(apply_rotary(self._heads(k, self.n_kv_heads), cos, sin))
        v_BKWd = self.whole(self._heads(v, self.n_kv_heads))
        segment_ids_BW = None
        if segment_ids_BS is not None:
            parts = self.gather_segments(ops.cast(segment_ids_BS, mstype.float32))
            segment_ids_BW = ops.cast(ops.cat(ops.unbind(parts), 1), segment_ids_BS.dtype)
        out_BHSd = self.attend(q_BHSd, k_BKWd, v_BKWd, segment_ids_BS, segment_ids_BW)
        return ops.reshape(ops.transpose(out_BHSd, (0, 2, 1, 3)), (batch, length, width))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        batch, length, _ = x.shape
        return ops.transpose(ops.reshape(x, (batch, length, heads, self.head_dim)), (0, 2, 1, 3))


class KeepOverRanks(nn.Cell):
    """Which assignments have a place with their expert, where several ranks share a batch.

    Every rank hands out the places of the whole batch, in its order, and reads off its own.

    Args:
        group: the ranks that split the sequence.
        shape: (B, S).
        dispatch: hands out places among all tokens; None drops nothing.
        experts: E.
    """

    def __init__(
        self, group: ProcessGroup, shape: tuple[int, int], dispatch: Dispatch | None, experts: int
    ) -> None:
        super().__init__()
        self.batch, self.length = shape
        self.index, self.size = group.index, group.size
        self.dispatch = dispatch
        self.ids_E = Tensor(np.arange(experts, dtype=np.int32))
        self.gather = transport.all_gather(group)

    def construct(self, expert_Tk: Tensor, valid_Tk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns kept_Tk of this rank; counts_E before and after dropping, of all ranks."""
        top_k = expert_Tk.shape[1]
        expert_all = self._whole(ops.where(valid_Tk, expert_Tk, Tensor(-1, mstype.int32)), top_k)
        valid_all = expert_all >= 0
        chosen = ops.equal(ops.reshape(expert_all, (-1, 1)), self.ids_E)
        counts_E = ops.sum(ops.cast(chosen, mstype.int32), 0)
        if self.dispatch is None:
            return valid_Tk, counts_E, counts_E
        _, kept_all, _, sizes_E, *_ = self.dispatch(expert_all, valid_all)
        kept = ops.reshape(kept_all, (self.batch, self.size, self.length, top_k))[:, self.index]
        return ops.reshape(kept, expert_Tk.shape), counts_E, sizes_E

    def _whole(self, expert_Tk: Tensor, top_k: int) -> Tensor:
        """(B * W, k), the batch's rows one after another."""
        parts = self.gather(ops.cast(expert_Tk, mstype.float32))
        parts = ops.reshape(parts, (self.size, self.batch, self.length, top_k))
        whole = ops.transpose(parts, (1, 0, 2, 3))
        return ops.cast(ops.reshape(whole, (-1, top_k)), mstype.int32)
