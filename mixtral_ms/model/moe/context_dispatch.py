"""Token dispatch where context-parallel ranks share a batch.

Legend: B batch, S positions of this rank, W of the whole sequence, T = B * S tokens, E experts,
k experts a token.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.model.moe.token_dispatch import Dispatch
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import ProcessGroup


class DispatchOverRanks(nn.Cell):
    """As `Dispatch`, where several ranks share a batch.

    Every rank hands out the slots of the whole batch, in its order, and reads off its own.

    Args:
        group: the ranks that split the sequence.
        shape: (B, S).
        whole: hands out slots among all tokens.
        own: gives slots on this rank to its assignments that were not dropped.
    """

    def __init__(
        self, group: ProcessGroup, shape: tuple[int, int], whole: Dispatch, own: Dispatch
    ) -> None:
        super().__init__()
        self.batch, self.length = shape
        self.index, self.size = group.index, group.size
        self.whole, self.own = whole, own
        self.gather = transports.all_gather(group)

    def construct(self, expert_Tk: Tensor, valid_Tk: Tensor) -> tuple:
        """As `Dispatch`; the counts of each expert are those of all ranks."""
        top_k = expert_Tk.shape[1]
        expert_all = self._of_all(ops.where(valid_Tk, expert_Tk, Tensor(-1, mstype.int32)), top_k)
        _, not_dropped_all, _, _, tokens_per_expert_E, kept_tokens_per_expert_E = self.whole(
            expert_all, expert_all >= 0
        )
        not_dropped_all = ops.reshape(not_dropped_all, (self.batch, self.size, self.length, top_k))
        not_dropped_Tk = ops.reshape(not_dropped_all[:, self.index], expert_Tk.shape)
        slot_Tk, not_dropped_Tk, assignment_R, tokens_per_local_expert_e, _, _ = self.own(
            expert_Tk, not_dropped_Tk
        )
        return (
            slot_Tk,
            not_dropped_Tk,
            assignment_R,
            tokens_per_local_expert_e,
            tokens_per_expert_E,
            kept_tokens_per_expert_E,
        )

    def bprop(self, expert_Tk: Tensor, valid_Tk: Tensor, out: tuple, dout: tuple) -> tuple:
        """Slots have no gradient."""
        return zeros_like(expert_Tk), zeros_like(valid_Tk)

    def _of_all(self, expert_Tk: Tensor, top_k: int) -> Tensor:
        """(B * W, k), the batch's sequences one after another."""
        parts = self.gather(ops.cast(expert_Tk, mstype.float32))
        parts = ops.reshape(parts, (self.size, self.batch, self.length, top_k))
        whole = ops.transpose(parts, (1, 0, 2, 3))
        return ops.cast(ops.reshape(whole, (-1, top_k)), mstype.int32)
