"""Expert parallel: rows go to the ranks that have their experts, and come back.

Legend: P ranks of the group, R rows of a rank, N rows that can come from all of them, D hidden,
E experts that these ranks have together, e those of one rank.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.collectives import ExchangeRows
from mixtral_ms.parallel.comm.graph_primitives import sum_before, sum_over, zeros_like
from mixtral_ms.parallel.grid.mesh import Mesh, ProcessGroup


def experts_of_exchange(mesh: Mesh, experts: int) -> list[int]:
    """The experts that this rank's `exchange` group has, those of its first rank first.

    Where experts are spread over tensor-parallel ranks too, each of those has rows made for its
    own ones only; all of them hold the same tokens, and the sum over them completes the output.
    """
    _, parts, _ = expert_matrix(mesh.grid)
    each, taken = experts // parts, parts // mesh.exchange.size
    first_part = mesh.expert_part % taken
    return [
        part * each + expert for part in range(first_part, parts, taken) for expert in range(each)
    ]


class ExpertExchange(nn.Cell):
    """The way to the experts and back.

    Args:
        group: the ranks.
        experts: E.
        rows: R.
        capacity: rows of an expert at most; None for any number.
    """

    def __init__(self, group: ProcessGroup, experts: int, rows: int, capacity: int | None) -> None:
        super().__init__()
        self.index, self.size = group.index, group.size
        self.each = experts // group.size
        from_one = rows if capacity is None else min(rows, self.each * capacity)
        self.rows = group.size * from_one
        self.block_of = transports.BlockOf(self.rows)
        self.gather = transports.all_gather(group)
        self.there = ExchangeRows(group, rows, self.rows)
        self.back = ExchangeRows(group, self.rows, rows)
        self.reorder = _Reorder()

    def construct(self, x_RD: Tensor, sizes_E: Tensor) -> tuple:
        """Rows packed by expert -> rows (N, D) of this rank's experts, and their sizes_e.

        sizes_E are in the order of `experts_of_exchange`.
        What is behind them is undefined. The third result is the way back, for `returned`.
        """
        counts_PE = ops.cast(self.gather(ops.cast(sizes_E, mstype.float32)), mstype.int32)
        sent_PP = sum_over(ops.reshape(counts_PE, (self.size, self.size, self.each)), 2)
        begin = self.index * self.each
        counts_Pe = counts_PE[:, begin : begin + self.each]
        # they come by rank, then by expert; experts want all their rows together
        by_expert_N, by_rank_N = self._orders(counts_Pe)
        rows_ND = self.reorder(self.there(x_RD, sent_PP), by_expert_N, by_rank_N)
        return rows_ND, sum_over(counts_Pe, 0), (sent_PP, by_expert_N, by_rank_N)

    def returned(self, y_ND: Tensor, way: tuple) -> Tensor:
        """The outputs of the rows that were given, (R, D), in their order."""
        sent_PP, by_expert_N, by_rank_N = way
        by_rank_ND = self.reorder(y_ND, by_rank_N, by_expert_N)
        return self.back(by_rank_ND, ops.transpose(sent_PP, (1, 0)))

    def _orders(self, counts_Pe: Tensor) -> tuple[Tensor, Tensor]:
        """The index that sorts rows by (expert, rank), and the one that sorts them back."""
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
        block_N, place_N = self.block_of(sizes)
        return ops.minimum(ops.gather(begins, block_N, 0) + place_N, self.rows - 1)


class _Reorder(nn.Cell):
    """Rows in another order; the gradient takes the inverse one instead of a scatter."""

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
