"""Checks every collective and its gradient against numpy on three ranks; run by test_collectives.

Each rank knows what all ranks hold, so the expected result is computed without communication.
"""

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.parallel.comm import collectives
from mixtral_ms.parallel.comm.process_groups import connect

RANKS = 3
SENT = np.array([[2, 0, 3], [0, 0, 5], [1, 4, 0]], np.int32)
"""Rows from each rank (of 5 or fewer) to each rank."""


def values(seed, *shape):
    """What each rank holds: (RANKS, ...)."""
    return np.random.default_rng(seed).standard_normal((RANKS, *shape)).astype(np.float32)


class _Inner(nn.Cell):
    """As in the network: a cell with a gradient of its own is not what is differentiated first."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, x, *more):
        return self.cell(x * 1.0, *more)


class WithGradient(nn.Cell):
    """A cell's output, and the gradient of its input for given gradients of the output."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradient = ops.GradOperation(sens_param=True)(_Inner(cell))

    def construct(self, dout, *inputs):
        return self.cell(*inputs), self.gradient(*inputs, dout)


def check(cell, inputs, dout, expected, expected_gradient):
    dout = tuple(map(Tensor, dout)) if isinstance(dout, tuple) else Tensor(dout)
    out, gradient = WithGradient(cell)(dout, *map(Tensor, inputs))
    out = out[0] if isinstance(out, tuple) else out
    np.testing.assert_allclose(out.asnumpy()[: len(expected)], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient.asnumpy(), expected_gradient, rtol=1e-6, atol=1e-6)


def check_all(group):
    me = group.index
    x, dout = values(1, 2, 6, 2), values(2, 2, 6, 2)
    alike, d_alike = x[0], dout[0]
    part = slice(2 * me, 2 * me + 2)
    check(collectives.CopyToRanks(group), [alike], dout[me], alike, dout.sum(0))
    check(collectives.SumOverRanks(group), [x[me]], d_alike, x.sum(0), d_alike)
    # each rank's part of axis 1
    d_part = dout[:, :, :2]
    joined = np.concatenate(list(d_part), 1)
    check(collectives.SplitToRanks(group, 1), [alike], d_part[me], alike[:, part], joined)
    check(collectives.SumScatter(group, 1), [x[me]], d_part[me], x.sum(0)[:, part], joined)
    own = x[me][:, :2]
    whole = np.concatenate([one[:, :2] for one in x], 1)
    gather = collectives.GatherFromRanks(group, 1, partial=True)
    check(gather, [own], dout[me], whole, dout.sum(0)[:, part])
    gather = collectives.GatherFromRanks(group, 1, partial=False)
    check(gather, [own], d_alike, whole, d_alike[:, part])
    both = (dout[me], d_alike)
    check(collectives.EnterSplit(group, sequence=False), [alike], dout[me], alike, dout.sum(0))
    enter = collectives.EnterSplit(group, sequence=True)
    check(enter, [own], dout[me], whole, dout.sum(0)[:, part])
    enter = collectives.EnterSplitTwice(group, sequence=False)
    check(enter, [alike], both, alike, dout.sum(0) + d_alike)
    enter = collectives.EnterSplitTwice(group, sequence=True)
    check(enter, [own], both, whole, (dout.sum(0) + d_alike)[:, part])


def exchanged(rows, sent, rank):
    """What `rank` receives, by slicing."""
    begins = np.cumsum(sent, 1) - sent
    parts = [rows[s][begins[s, rank] : begins[s, rank] + sent[s, rank]] for s in range(RANKS)]
    return np.concatenate(parts)


def check_exchange(group, sent, rows_in, rows_out):
    x, dout = values(3, rows_in, 2), values(4, rows_out, 2)
    cell = collectives.AllToAll(group, rows_in, rows_out)
    out, gradient = WithGradient(cell)(
        Tensor(dout[group.index]), Tensor(x[group.index]), Tensor(sent)
    )
    expected = exchanged(x, sent, group.index)
    np.testing.assert_array_equal(out.asnumpy()[: len(expected)], expected)
    expected = exchanged(dout, sent.T, group.index)
    np.testing.assert_array_equal(gradient.asnumpy()[: len(expected)], expected)


def main():
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    group = connect(ParallelConfig(data_parallel=RANKS)).tokens
    check_all(group)
    check_exchange(group, SENT, 5, 15)
    check_exchange(group, SENT.T.copy(), 15, 5)  # the way back: many rows in, few out
    check_exchange(group, np.zeros_like(SENT), 5, 15)  # nobody sends anything
    everything = np.zeros_like(SENT)
    everything[:, 1] = 5  # all to one rank
    check_exchange(group, everything, 5, 15)
    print(f"rank {group.index}: collectives agree")


if __name__ == "__main__":
    main()
