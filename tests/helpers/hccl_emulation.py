"""Ascend's collectives between CPU processes, as their documentation describes them.

MCCL compiles AllReduce only, so each is a sum of buffers that are zero but for a rank's own part.
They raise where a documented rule is broken. AlltoAllV gives as many values as came; a graph for
the CPU has no such size, so here NaN follows them, which nobody may read.

Where ranks do not agree on the counts, nothing comes.

Legend: P ranks of the group.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_group_size, get_rank

from helpers.ascend_emulation import require
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import ProcessGroup


def emulate_hccl(monkeypatch):
    """Until the patch is undone, collectives of compiled networks are those of Ascend."""
    monkeypatch.setattr(transports, "_on_cpu", lambda: False)
    for operator in (AllGather, ReduceScatter, AlltoAll, AlltoAllV):
        monkeypatch.setattr(ops, operator.__name__, operator)


def _group(name):
    size = get_group_size(name)
    return ProcessGroup(tuple(range(size)), get_rank(name), name)


class _Everyone(nn.Cell):
    """x (...) -> (P, ...). MCCL sums floats only; counts and ids are exact in float32."""

    def __init__(self, own):
        super().__init__()
        self.gather = transports._GatherBySum(own)

    def construct(self, x):
        return ops.cast(self.gather(ops.cast(x, mstype.float32)), x.dtype)


class AllGather(nn.Cell):
    """x (N, ...) -> (P N, ...)."""

    def __init__(self, group):
        super().__init__()
        self.gather = _Everyone(_group(group))

    def construct(self, x):
        everyone = self.gather(x)
        return ops.reshape(everyone, (-1, *x.shape[1:]))


class ReduceScatter(nn.Cell):
    """x (P N, ...) -> (N, ...), of the sum."""

    def __init__(self, op, group):
        super().__init__()
        require(op == ops.ReduceOp.SUM, "the emulation knows sums")
        own = _group(group)
        self.size, self.scatter = own.size, transports._ScatterBySum(own)

    def construct(self, x):
        require(x.shape[0] % self.size == 0, "the first axis divides by the ranks")
        return self.scatter(ops.reshape(x, (self.size, -1, *x.shape[1:])))


class AlltoAll(nn.Cell):
    """Equal parts of axis 0 change places."""

    def __init__(self, split_count, split_dim, concat_dim, group):
        super().__init__()
        own = _group(group)
        require(split_count == own.size, "split_count is the number of ranks")
        require((split_dim, concat_dim) == (0, 0), "the emulation knows axis 0")
        self.index, self.size, self.gather = own.index, own.size, _Everyone(own)

    def construct(self, x):
        require(x.shape[0] % self.size == 0, "the axis divides by split_count")
        blocks = ops.reshape(x, (self.size, -1, *x.shape[1:]))
        return ops.reshape(self.gather(blocks)[:, self.index], x.shape)


class AlltoAllV(nn.Cell):
    """Flat values in blocks: counts of blocks to and from each rank."""

    def __init__(self, group, block_size):
        super().__init__()
        own = _group(group)
        self.index, self.size, self.block = own.index, own.size, block_size
        self.gather = _Everyone(own)

    def construct(self, x, send_P, receive_P):
        require(x.ndim == 1, "a flat tensor")
        require(send_P.dtype == receive_P.dtype == mstype.int64, "counts are int64")
        rows = x.shape[0] // self.block  # of each rank
        everyone = ops.reshape(self.gather(x), (self.size * rows, self.block))
        sent_PP = self.gather(ops.cast(send_P, mstype.int32))
        agreed = ops.all(ops.equal(sent_PP[:, self.index], ops.cast(receive_P, mstype.int32)))
        number = Tensor(np.arange(self.size * rows))
        result = zeros_like(everyone) + float("nan")
        end = 0
        for source in range(self.size):
            before, own = 0, sent_PP[source, self.index]
            for target in range(self.index):
                before = before + sent_PP[source, target]
            offset = number - end
            came = ops.logical_and(ops.logical_and(offset >= 0, offset < own), agreed)
            index = ops.clamp(source * rows + before + offset, 0, self.size * rows - 1)
            came = ops.broadcast_to(ops.expand_dims(came, 1), everyone.shape)
            result = ops.select(came, ops.gather(everyone, index, 0), result)
            end = end + own
        return ops.reshape(result, (-1,))
