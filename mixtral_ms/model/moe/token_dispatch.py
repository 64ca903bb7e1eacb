"""Token dispatch: the slot of each token's copies, by index, never by a one-hot product.

Legend: T tokens, k experts a token, A = T * k assignments, R slots of all experts, E experts, e
local experts, C capacity, D hidden.
"""

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.parallel.comm.graph_primitives import running_sum, sum_before, sum_over, zeros_like


def expert_capacity(
    tokens: int, top_k: int, experts: int, capacity_factor: float, multiple_of: int = 1
) -> int:
    """Slots per expert, C = min(ceil(k * N * factor / E), N), rounded up to `multiple_of`.

    Args:
        tokens: N, the tokens of one data-parallel group.
        top_k: k, experts a token.
        experts: E.
        capacity_factor: above 0.
        multiple_of: ranks that share an expert's slots (expert tensor parallel).

    Source: TopkRouterV2 of MindFormers.
    """
    # The product in Python floats, as upstream: 1.1 * 2 * 40 / 8 is 11.000000000000002 -> 12.
    capacity = min(math.ceil(top_k * tokens * capacity_factor / experts), tokens)
    return multiple_of * math.ceil(capacity / multiple_of)


class Dispatch(nn.Cell):
    """Token dispatch: gives every assignment (token, choice) a slot of its expert, or drops it.

    Args:
        experts: E.
        capacity: C, slots per expert; None for dropless.
        token_first: hand out slots token by token (sdrop) instead of choice by choice (kdrop).
        layout: how the experts want their slots: "packed" or "padded".
        local_experts: those that get slots at all, in ascending order; None for all. Assignments
            of the others take their turn in the queue as ever, but have no slot.
    """

    def __init__(
        self,
        experts: int,
        capacity: int | None,
        token_first: bool,
        layout: str,
        local_experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.layout = layout
        # kdrop goes through all first choices, then all second ones; both orders undo themselves
        self.order, self.turn = (0, 1) if token_first else (1, 0), ops.Transpose()
        self.ids_E = Tensor(np.arange(experts, dtype=np.int32))
        self.scatter, self.slice = ops.ScatterNd(), ops.Slice()
        self.local_experts_e = self.is_local_E = None
        placed = np.arange(experts)  # an expert's number among those that get slots
        if local_experts is not None:
            is_local = np.isin(np.arange(experts), local_experts)
            self.local_experts_e = Tensor(np.array(local_experts, np.int32))
            self.is_local_E = Tensor(is_local.astype(np.int32))
            placed = np.cumsum(is_local) - 1
        self.padded_slots = (int(placed[-1]) + 1) * (capacity or 0)
        self.padded_offsets_E = Tensor((placed * (capacity or 0)).astype(np.int32))

    def slots(self, assignments: int) -> int:
        """R, the static number of slots that this many assignments may need."""
        if self.layout == "padded":
            return self.padded_slots
        return assignments

    def construct(self, expert_Tk: Tensor, valid_Tk: Tensor) -> tuple:
        """Slots for the assignments of expert_Tk (int32); invalid ones (of padding) get none.

        Returns:
            slot_Tk: the slot of each assignment, 0 where it has none.
            not_dropped_Tk: whether it has a slot.
            assignment_R: index into the flattened (T, k) of what fills each slot, -1 for empty.
            tokens_per_local_expert_e: slots used by each expert, or by each local one.
            tokens_per_expert_E: assignments to each expert before dropping.
            kept_tokens_per_expert_E: those of them that were not dropped.
        """
        ordered = self.turn(expert_Tk, self.order)
        expert_A1 = ops.reshape(ordered, (-1, 1))
        valid_A1 = ops.reshape(self.turn(valid_Tk, self.order), (-1, 1))
        chosen_AE = ops.logical_and(ops.equal(expert_A1, self.ids_E), valid_A1)
        chosen_AE = ops.cast(chosen_AE, mstype.int32)
        tokens_per_expert_E = sum_over(chosen_AE, 0)
        # The slot in the queue of each expert, read off at the assignment's own expert.
        queue_slot_A = sum_over(running_sum(chosen_AE, 0) * chosen_AE, 1) - 1
        not_dropped_A = ops.reshape(valid_A1, (-1,))
        kept_tokens_per_expert_E = tokens_per_expert_E
        if self.capacity is not None:
            not_dropped_A = ops.logical_and(not_dropped_A, queue_slot_A < self.capacity)
            kept_tokens_per_expert_E = ops.minimum(
                tokens_per_expert_E, Tensor(self.capacity, mstype.int32)
            )
        if self.local_experts_e is None:
            tokens_per_local_expert_e = kept_tokens_per_expert_E
            offsets_E = self._offsets(kept_tokens_per_expert_E)
        else:
            tokens_per_local_expert_e = ops.gather(
                kept_tokens_per_expert_E, self.local_experts_e, 0
            )
            offsets_E = self._offsets(kept_tokens_per_expert_E * self.is_local_E)
            not_dropped_A = ops.logical_and(
                not_dropped_A, sum_over(chosen_AE * self.is_local_E, 1) > 0
            )
        slot_A = sum_over(chosen_AE * offsets_E, 1) + queue_slot_A
        slot_A = ops.where(not_dropped_A, slot_A, Tensor(0, mstype.int32))
        slot_Tk = self.turn(ops.reshape(slot_A, ordered.shape), self.order)
        not_dropped_Tk = self.turn(ops.reshape(not_dropped_A, ordered.shape), self.order)
        return (
            slot_Tk,
            not_dropped_Tk,
            self._inverse(slot_Tk, not_dropped_Tk),
            tokens_per_local_expert_e,
            tokens_per_expert_E,
            kept_tokens_per_expert_E,
        )

    def bprop(self, expert_Tk: Tensor, valid_Tk: Tensor, out: tuple, dout: tuple) -> tuple:
        """Slots have no gradient."""
        return zeros_like(expert_Tk), zeros_like(valid_Tk)

    def _offsets(self, tokens_per_expert_E: Tensor) -> Tensor:
        """First slot of each expert."""
        if self.layout == "padded":
            return self.padded_offsets_E
        return sum_before(tokens_per_expert_E, 0)

    def _inverse(self, slot_Tk: Tensor, not_dropped_Tk: Tensor) -> Tensor:
        """The assignment of each slot; dropped ones are scattered to a slot past the end."""
        count = slot_Tk.shape[0] * slot_Tk.shape[1]
        slots = self.slots(count)
        target_Tk = ops.where(not_dropped_Tk, slot_Tk, Tensor(slots, mstype.int32))
        # ScatterNd starts from zero, so assignment a is written as a + 1 and empty slots read -1.
        numbers_A = ops.arange(1, count + 1, 1, dtype=mstype.int32)
        filled = self.scatter(ops.reshape(target_Tk, (count, 1)), numbers_A, (slots + 1,))
        return self.slice(filled, (0,), (slots,)) - 1


class PermuteTokens(nn.Cell):
    """Token permutation: copies tokens to their slots; the gradient is by index too, no scatter."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def construct(
        self, x_TD: Tensor, assignment_R: Tensor, slot_Tk: Tensor, not_dropped_Tk: Tensor
    ) -> Tensor:
        """Returns (R, D); empty slots hold token 0, and nothing reads them."""
        token_R = ops.maximum(assignment_R, Tensor(0, mstype.int32)) // self.top_k
        return ops.gather(x_TD, token_R, 0)

    def bprop(  # noqa: PLR0913 - MindSpore's signature: inputs, output, its gradient
        self,
        x_TD: Tensor,
        assignment_R: Tensor,
        slot_Tk: Tensor,
        not_dropped_Tk: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple:
        """Each token sums the gradients of its own slots."""
        tokens, hidden = x_TD.shape
        d_AD = ops.gather(dout, ops.reshape(slot_Tk, (tokens * self.top_k,)), 0)
        d_TkD = _without_dropped(ops.reshape(d_AD, (tokens, self.top_k, hidden)), not_dropped_Tk)
        return (
            ops.sum(d_TkD, 1),
            zeros_like(assignment_R),
            zeros_like(slot_Tk),
            zeros_like(not_dropped_Tk),
        )


class CombineTokens(nn.Cell):
    """Sums each token's expert outputs, weighted by its gates; dropped assignments add nothing."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def construct(
        self,
        y_RD: Tensor,
        gates_Tk: Tensor,
        assignment_R: Tensor,
        slot_Tk: Tensor,
        not_dropped_Tk: Tensor,
    ) -> Tensor:
        """Returns (T, D)."""
        y_TkD = self._picked(y_RD, slot_Tk, not_dropped_Tk)
        return ops.sum(y_TkD * _along(gates_Tk, 2, y_TkD), 1)

    def _picked(self, y_RD: Tensor, slot_Tk: Tensor, not_dropped_Tk: Tensor) -> Tensor:
        tokens = slot_Tk.shape[0]
        y_AD = ops.gather(y_RD, ops.reshape(slot_Tk, (tokens * self.top_k,)), 0)
        y_TkD = ops.reshape(y_AD, (tokens, self.top_k, y_RD.shape[1]))
        return _without_dropped(y_TkD, not_dropped_Tk)

    def bprop(  # noqa: PLR0913 - MindSpore's signature: inputs, output, its gradient
        self,
        y_RD: Tensor,
        gates_Tk: Tensor,
        assignment_R: Tensor,
        slot_Tk: Tensor,
        not_dropped_Tk: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple:
        """Each slot takes its token's gradient times its gate; empty ones take none."""
        filled_R = assignment_R >= 0
        index_R = ops.maximum(assignment_R, Tensor(0, mstype.int32))
        gates_A = ops.reshape(gates_Tk, (gates_Tk.shape[0] * self.top_k,))
        gate_R = ops.gather(gates_A, index_R, 0) * ops.cast(filled_R, gates_Tk.dtype)
        dout_RD = ops.gather(dout, index_R // self.top_k, 0)
        d_y_RD = dout_RD * _along(gate_R, 1, dout_RD)
        y_TkD = self._picked(y_RD, slot_Tk, not_dropped_Tk)
        d_gates_Tk = ops.sum(y_TkD * _along(dout, 1, y_TkD), 2)
        return (
            d_y_RD,
            d_gates_Tk,
            zeros_like(assignment_R),
            zeros_like(slot_Tk),
            zeros_like(not_dropped_Tk),
        )


def _without_dropped(x_TkD: Tensor, not_dropped_Tk: Tensor) -> Tensor:
    """0 for dropped assignments, whose slot is not their own.

    Not a product with 0: where no slot is used at all, nobody wrote the one that they read, and on
    Ascend such slots hold whatever the memory held before, NaN included.
    """
    dropped_Tk = ops.logical_not(not_dropped_Tk)
    return ops.masked_fill(x_TkD, _along(dropped_Tk, 2, x_TkD), 0.0)


def _along(x: Tensor, axis: int, like: Tensor) -> Tensor:
    """x repeated along a new axis, to the shape of `like`.

    Products and the like broadcast by themselves too, but their CPU kernels then keep, for good,
    two or three lists of indices with 8 bytes for each value of the result.
    """
    return ops.broadcast_to(ops.expand_dims(x, axis), like.shape)
