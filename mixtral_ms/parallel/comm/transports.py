"""Collectives inside the compiled network, all-to-all among them; gradients: collectives.py.

Three kinds, chosen by the functions of this file:
  CPU       MCCL compiles AllReduce only, so the others are sums of buffers that are zero but for a
            rank's own part: the same numbers, more bytes.
  Ascend    HCCL's own collectives. CI cannot run them; the same contract tests can, with
            `pytest --device Ascend`.
  simulated nobody is there: a rank of a grid is only simulated (`Mesh` without a connection). Bytes
            are counted, in PyNative mode, as a ring would send them.

Legend: P ranks of the group, N rows, D columns.
"""

from collections import Counter

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.parallel.comm.graph_primitives import sum_before, sum_over, zeros_like
from mixtral_ms.parallel.grid.mesh import ProcessGroup

sent_bytes: Counter[str] = Counter()
"""By the kind of group: what simulated ranks would have sent (see above)."""


def all_reduce(group: ProcessGroup) -> nn.Cell:
    """x -> the sum of the ranks' x."""
    return _CountedSum(group) if is_simulated(group) else _AllReduce(group)


def all_gather(group: ProcessGroup) -> nn.Cell:
    """x (...) -> (P, ...), the ranks' x in order."""
    if is_simulated(group):
        return _CountedGather(group)
    return _GatherBySum(group) if _on_cpu() else _AllGather(group)


def reduce_scatter(group: ProcessGroup) -> nn.Cell:
    """x (P, ...) -> (...), this rank's part of the sum of the ranks' x."""
    if is_simulated(group):
        return _CountedScatter(group)
    return _ScatterBySum(group) if _on_cpu() else _ReduceScatter(group)


def all_to_all(group: ProcessGroup, rows_in: int, rows_out: int) -> nn.Cell:
    """All-to-all (AllToAllV), rows to their ranks: x (rows_in, D), sent_PP int32 -> (rows_out, D).

    sent_PP[s, d] rows go from rank s to rank d. x holds those for rank 0 first, then those for rank
    1, ...; so does the result hold those from rank 0 first. What is behind them is undefined.
    """
    if is_simulated(group):
        return _CountedExchange(group, rows_out)
    if not _on_cpu():
        return _AllToAllV(group, rows_in, rows_out)
    if rows_in <= rows_out:
        return _ExchangeByGather(group, rows_in, rows_out)
    return _ExchangeByScatter(group, rows_out)


def equal_all_to_all(group: ProcessGroup) -> nn.Cell:
    """All-to-all of equal blocks: x (P, ...) -> (P, ...); block p goes to rank p.

    Nothing depends on counts, so that no host has to wait for them.
    """
    if is_simulated(group):
        return _CountedBlocks(group)
    return _BlocksByGather(group) if _on_cpu() else _AllToAll(group)


def is_simulated(group: ProcessGroup) -> bool:
    """Whether nobody is there: bytes are counted, and something of the right shape is given."""
    return group.size > 1 and not group.name


def count(group: ProcessGroup, tensor: Tensor, times: float) -> None:
    """Add `times` the bytes of a tensor to what a simulated rank would have sent."""
    sent_bytes[group.kind] += times * tensor.size * tensor.itemsize


def _on_cpu() -> bool:
    return mindspore.get_context("device_target") == "CPU"


class _AllReduce(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.sum = ops.AllReduce(group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)


class _GatherBySum(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.index, self.size, self.concat = group.index, group.size, ops.Concat(0)
        self.sum = ops.AllReduce(group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        x = ops.expand_dims(x, 0)
        zeros = zeros_like(x)
        parts: tuple[Tensor, ...] = ()
        for rank in range(self.size):
            parts += (x if rank == self.index else zeros,)
        return self.sum(self.concat(parts))


class _ScatterBySum(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.index = group.index
        self.sum = ops.AllReduce(group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        return self.sum(x)[self.index]


class _ExchangeByGather(nn.Cell):
    """Everybody's rows, of which the own ones are picked: best where many rows come out."""

    def __init__(self, group: ProcessGroup, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.index, self.size, self.rows_in = group.index, group.size, rows_in
        self.gather, self.block_of = _GatherBySum(group), BlockOf(rows_out)
        self.begins_P = Tensor(np.arange(group.size, dtype=np.int32) * rows_in)

    def construct(self, x_ND: Tensor, sent_PP: Tensor) -> Tensor:
        everyone_PND = self.gather(x_ND)
        everyone = ops.reshape(everyone_PND, (self.size * self.rows_in, x_ND.shape[1]))
        source, offset = self.block_of(sent_PP[:, self.index])
        before_PP = sum_before(sent_PP, 1)
        begin_P = self.begins_P + before_PP[:, self.index]
        index = ops.minimum(ops.gather(begin_P, source, 0) + offset, self.size * self.rows_in - 1)
        return ops.gather(everyone, index, 0)


class _ExchangeByScatter(nn.Cell):
    """Everybody's result, to which each rank adds its rows: best where few rows come out."""

    def __init__(self, group: ProcessGroup, rows_out: int) -> None:
        super().__init__()
        self.index, self.size, self.rows_out = group.index, group.size, rows_out
        self.scatter = _ScatterBySum(group)
        self.rows_N = Tensor(np.arange(rows_out, dtype=np.int32))
        self.select, self.stack = ops.Select(), ops.Stack()

    def construct(self, x_ND: Tensor, sent_PP: Tensor) -> Tensor:
        mine_P = sent_PP[self.index]
        begin_P = sum_before(mine_P, 0)
        earlier_P = sum_before(sent_PP, 0)[self.index]
        results: tuple[Tensor, ...] = ()
        for target in range(self.size):
            offset = self.rows_N - earlier_P[target]
            held = ops.logical_and(offset >= 0, offset < mine_P[target])
            index = self.select(held, begin_P[target] + offset, zeros_like(offset))
            picked = ops.gather(x_ND, index, 0)
            held_ND = ops.broadcast_to(ops.expand_dims(held, 1), picked.shape)
            results += (self.select(held_ND, picked, zeros_like(picked)),)
        return self.scatter(self.stack(results))


class _BlocksByGather(nn.Cell):
    """Everybody's blocks, of which those for this rank are picked."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.index, self.gather = group.index, _GatherBySum(group)

    def construct(self, x: Tensor) -> Tensor:
        return self.gather(x)[:, self.index]


class BlockOf(nn.Cell):
    """For each row of blocks that follow each other: its block, and its offset in the block.

    Args:
        rows: how many rows there are; those behind the blocks count to the last one.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows_N = Tensor(np.arange(rows, dtype=np.int32))

    def construct(self, sizes_P: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the blocks -> (N), (N)."""
        begin_P = sum_before(sizes_P, 0)
        end_P = begin_P + sizes_P
        passed_NP = ops.expand_dims(self.rows_N, 1) >= ops.expand_dims(end_P, 0)
        block_N = sum_over(ops.cast(passed_NP, mstype.int32), 1)
        block_N = ops.minimum(block_N, sizes_P.shape[0] - 1)
        return block_N, self.rows_N - ops.gather(begin_P, block_N, 0)


class _AllGather(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.gather = ops.AllGather(group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        return self.gather(ops.expand_dims(x, 0))


class _ReduceScatter(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.scatter = ops.ReduceScatter(ops.ReduceOp.SUM, group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        return self.scatter(x)[0]


class _AllToAll(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.exchange = ops.AlltoAll(group.size, 0, 0, group=group.name)

    def construct(self, x: Tensor) -> Tensor:
        flat = ops.reshape(x, (x.shape[0] * x.shape[1], -1))
        return ops.reshape(self.exchange(flat), x.shape)


class _AllToAllV(nn.Cell):
    """The operator gives as many rows as came, and no shape at all where none did.

    So every rank sends every rank one row more than it has for it, which nobody reads.
    """

    def __init__(self, group: ProcessGroup, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.index, self.group, self.rows_in = group.index, group.name, rows_in
        self.sent_block_of = BlockOf(rows_in + group.size)
        self.received_block_of = BlockOf(rows_out)

    def construct(self, x_ND: Tensor, sent_PP: Tensor) -> Tensor:
        columns = x_ND.shape[1]
        send_P, receive_P = sent_PP[self.index], sent_PP[:, self.index]
        block, offset = self.sent_block_of(send_P + 1)
        index = ops.gather(sum_before(send_P, 0), block, 0) + offset
        x = ops.gather(x_ND, ops.minimum(index, self.rows_in - 1), 0)
        exchange = ops.AlltoAllV(group=self.group, block_size=columns)
        received = exchange(
            ops.reshape(x, (-1,)),
            ops.cast(send_P + 1, mstype.int64),
            ops.cast(receive_P + 1, mstype.int64),
        )
        # of what came, up to a fixed number of rows for what is compiled behind
        block, offset = self.received_block_of(receive_P)
        index = ops.gather(sum_before(receive_P + 1, 0), block, 0) + offset
        last = sum_over(receive_P + 1, 0) - 1
        return ops.gather(ops.reshape(received, (-1, columns)), ops.minimum(index, last), 0)


class _Counted(nn.Cell):
    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.others = (group.size - 1) / group.size


class _CountedSum(_Counted):
    def construct(self, x: Tensor) -> Tensor:
        count(self.group, x, 2 * self.others)
        return x


class _CountedGather(_Counted):
    def construct(self, x: Tensor) -> Tensor:
        count(self.group, x, self.group.size - 1)
        return ops.stack([x] * self.group.size)


class _CountedScatter(_Counted):
    def construct(self, x: Tensor) -> Tensor:
        count(self.group, x, self.others)
        return x[self.group.index]


class _CountedBlocks(_Counted):
    def construct(self, x: Tensor) -> Tensor:
        count(self.group, x, self.others)
        return x


class _CountedExchange(_Counted):
    """As if every rank sent as many rows to every other; what comes back is as many as came."""

    def __init__(self, group: ProcessGroup, rows_out: int) -> None:
        super().__init__(group)
        self.rows_out = rows_out

    def construct(self, x_ND: Tensor, sent_PP: Tensor) -> Tensor:
        used = int(sent_PP[self.group.index].asnumpy().sum())
        count(self.group, x_ND[0], used * self.others)
        index_N = np.minimum(np.arange(self.rows_out, dtype=np.int32), x_ND.shape[0] - 1)
        return ops.gather(x_ND, Tensor(index_N), 0)
