"""Expert parallel: all-to-all of tokens to the ranks that have their experts, and back.

Legend: P ranks of the group, R slots of a rank, N slots for what can come from all of them,
D hidden, E experts that these ranks have together, e those of one rank, C capacity.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.collectives import AllToAll, EqualAllToAll
from mixtral_ms.parallel.comm.graph_primitives import sum_before, sum_over, zeros_like
from mixtral_ms.parallel.grid.mesh import Mesh, ProcessGroup


def experts_of_exchange(mesh: Mesh, experts: int) -> list[int]:
    """The experts that this rank's `exchange` group has, those of its first rank first.

    Where experts are spread over tensor-parallel ranks too, each of those makes slots for its
    own ones only; all of them hold the same tokens, and the sum over them completes the output.
    """
    _, parts, _ = expert_matrix(mesh.grid)
    each, taken = experts // parts, parts // mesh.exchange.size
    first_part = mesh.expert_part % taken
    return [
        part * each + expert for part in range(first_part, parts, taken) for expert in range(each)
    ]


class ExpertExchange(nn.Cell):
    """Token dispatch and combine between ranks, each an all-to-all.

    Args:
        group: the ranks.
        experts: E.
        slots: R.
        capacity: slots of an expert at most; None for any number.
    """

    def __init__(self, group: ProcessGroup, experts: int, slots: int, capacity: int | None) -> None:
        super().__init__()
        self.index, self.size = group.index, group.size
        self.each = experts // group.size
        from_one = slots if capacity is None else min(slots, self.each * capacity)
        self.slots = group.size * from_one
        self.block_of = transports.BlockOf(self.slots)
        self.gather = transports.all_gather(group)
        self.dispatch_all_to_all = AllToAll(group, slots, self.slots)
        self.combine_all_to_all = AllToAll(group, self.slots, slots)
        self.reorder = _Reorder()

    def construct(self, x_RD: Tensor, tokens_per_expert_E: Tensor) -> tuple:
        """Tokens packed by expert -> those of this rank's experts, (N, D), and how many of each.

        tokens_per_expert_E is in the order of `experts_of_exchange`. What is behind the tokens is
        undefined. The third result is the dispatch_metadata that `combined` needs.
        """
        counts_PE = ops.cast(
            self.gather(ops.cast(tokens_per_expert_E, mstype.float32)), mstype.int32
        )
        sent_PP = sum_over(ops.reshape(counts_PE, (self.size, self.size, self.each)), 2)
        begin = self.index * self.each
        counts_Pe = counts_PE[:, begin : begin + self.each]
        # they come by rank, then by expert; experts want all their tokens together
        by_expert_N, by_rank_N = self._orders(counts_Pe)
        x_ND = self.reorder(self.dispatch_all_to_all(x_RD, sent_PP), by_expert_N, by_rank_N)
        return x_ND, sum_over(counts_Pe, 0), (sent_PP, by_expert_N, by_rank_N)

    def combined(self, y_ND: Tensor, dispatch_metadata: tuple) -> Tensor:
        """The outputs of the tokens that were given, (R, D), in their order."""
        sent_PP, by_expert_N, by_rank_N = dispatch_metadata
        by_rank_ND = self.reorder(y_ND, by_rank_N, by_expert_N)
        return self.combine_all_to_all(by_rank_ND, ops.transpose(sent_PP, (1, 0)))

    def _orders(self, counts_Pe: Tensor) -> tuple[Tensor, Tensor]:
        """The index that sorts slots by (expert, rank), and the one that sorts them back."""
        counts_eP = ops.transpose(counts_Pe, (1, 0))
        blocks = self.size * self.each
        begins_Pe = sum_before(ops.reshape(counts_Pe, (blocks,)), 0)
        begins_eP = sum_before(ops.reshape(counts_eP, (blocks,)), 0)
        to_eP = ops.reshape(ops.transpose(ops.reshape(begins_Pe, counts_Pe.shape), (1, 0)), (-1,))
        to_Pe = ops.reshape(ops.transpose(ops.reshape(begins_eP, counts_eP.shape), (1, 0)), (-1,))
        return (
            self._index(ops.reshape(counts_eP, (blocks,)), to_eP),
            self._index(ops.reshape(counts_Pe, (blocks,)), to_Pe),
        )

    def _index(self, sizes: Tensor, begins: Tensor) -> Tensor:
        block_N, offset_N = self.block_of(sizes)
        return ops.minimum(ops.gather(begins, block_N, 0) + offset_N, self.slots - 1)


class PaddedExchange(nn.Cell):
    """As `ExpertExchange` where every expert has the same number of slots, used or not.

    All shapes and all blocks are fixed: nobody waits for counts. And slots can go in parts, each
    with some of every expert's, so that the exchange of one part and the products of another do not
    depend on each other and may run at the same time.

    Args:
        group: the ranks.
        experts: E.
        capacity: C.
        degree: parts at most.
    """

    def __init__(self, group: ProcessGroup, experts: int, capacity: int, degree: int = 1) -> None:
        super().__init__()
        self.size, self.experts, self.each = group.size, experts, experts // group.size
        self.degree = min(degree, capacity)
        self.bounds = tuple(capacity * part // self.degree for part in range(self.degree + 1))
        self.dispatch_all_to_all = EqualAllToAll(group)
        self.combine_all_to_all = EqualAllToAll(group)
        self.join = ops.Concat(1)

    def construct(self, x_RD: Tensor, tokens_per_expert_E: Tensor) -> tuple:
        """Slots (E * C, D) of all experts -> those of this rank's experts, (e * P * C, D).

        Here and in `combined` they may be those of a part, with as many slots of each expert as it
        has. The second result is what was given, and what is third is not read: the slots say it
        all.
        """
        shape = (self.size, self.each, x_RD.shape[0] // self.experts, x_RD.shape[1])
        x_PeCD = self.dispatch_all_to_all(ops.reshape(x_RD, shape))
        x_ePCD = ops.transpose(x_PeCD, (1, 0, 2, 3))
        return ops.reshape(x_ePCD, x_RD.shape), tokens_per_expert_E, ()

    def combined(self, y_ND: Tensor, dispatch_metadata: tuple) -> Tensor:
        """The outputs of all experts' slots, (E * C, D)."""
        shape = (self.each, self.size, y_ND.shape[0] // self.experts, y_ND.shape[1])
        y_ePCD = ops.reshape(y_ND, shape)
        y_PeCD = self.combine_all_to_all(ops.transpose(y_ePCD, (1, 0, 2, 3)))
        return ops.reshape(y_PeCD, y_ND.shape)

    def part(self, x_RD: Tensor, number: int) -> Tensor:
        """Slots of one part."""
        x_ECD = ops.reshape(x_RD, (self.experts, -1, x_RD.shape[1]))
        x_ECD = x_ECD[:, self.bounds[number] : self.bounds[number + 1]]
        return ops.reshape(x_ECD, (-1, x_RD.shape[1]))

    def joined(self, parts: tuple) -> Tensor:
        """The slots of all parts."""
        columns = parts[0].shape[1]
        together: tuple[Tensor, ...] = ()
        for one in parts:
            together += (ops.reshape(one, (self.experts, -1, columns)),)
        return ops.reshape(self.join(together), (-1, columns))


class _Reorder(nn.Cell):
    """Tokens in another order; the gradient takes the inverse one instead of a scatter."""

    def construct(self, x_ND: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
        return ops.gather(x_ND, index_N, 0)

    def bprop(
        self, x_ND: Tensor, index_N: Tensor, inverse_N: Tensor, out: Tensor, dout: Tensor
    ) -> tuple:
        return (
            ops.gather(dout, inverse_N, 0),
            zeros_like(index_N),
            zeros_like(inverse_N),
        )
