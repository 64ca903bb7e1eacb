"""Ascend's all-to-all operators, played by one process for all ranks, as they are documented.

Legend: P ranks, D columns.
"""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.grid.mesh import ProcessGroup

pytestmark = pytest.mark.usefixtures("pynative")

RANKS, COLUMNS = 3, 2
SENT = {
    "some": np.array([[1, 2, 0], [0, 0, 3], [2, 1, 1]]),
    "nobody anything": np.zeros((3, 3), int),
    "all to one": np.array([[4, 0, 0], [5, 0, 0], [3, 0, 0]]),
    "one receives nothing": np.array([[1, 0, 2], [2, 0, 1], [1, 0, 3]]),
}


class Post:
    """What ranks send, in a first round; what they receive, in a second one."""

    def __init__(self):
        self.rank, self.sent = 0, {}

    def exchange(self, flat, send, receive, block):
        begin = np.concatenate([[0], np.cumsum(send)]) * block
        values = flat.asnumpy().ravel()
        for target in range(RANKS):
            self.sent[self.rank, target] = values[begin[target] : begin[target + 1]]
        came = [self.sent.get((source, self.rank)) for source in range(RANKS)]
        if any(one is None for one in came):
            return None  # the first round
        assert [len(one) for one in came] == [n * block for n in receive]
        return np.concatenate(came)


@pytest.fixture
def post(monkeypatch):
    office = Post()

    class AlltoAllV(nn.Cell):
        def __init__(self, group, block_size):
            super().__init__()
            self.block = block_size

        def construct(self, x, send, receive):
            assert x.ndim == 1, "documented: a flat tensor"
            assert send.dtype == receive.dtype == mindspore.int64
            send, receive = send.asnumpy(), receive.asnumpy()
            assert send.sum() * self.block <= x.size
            found = office.exchange(x, send, receive, self.block)
            if found is None:
                return Tensor(np.zeros(receive.sum() * self.block, np.float32))
            # documented: nothing received is a tensor without a shape
            return Tensor(found) if found.size else Tensor(np.float32(np.nan))

    class AlltoAll(nn.Cell):
        def __init__(self, split_count, split_dim, concat_dim, group):
            super().__init__()
            assert (split_count, split_dim, concat_dim) == (RANKS, 0, 0)

        def construct(self, x):
            each = [x.size // RANKS] * RANKS
            found = office.exchange(x, each, each, 1)
            return x if found is None else Tensor(found.reshape(x.shape))

    monkeypatch.setattr(ops, "AlltoAllV", AlltoAllV)
    monkeypatch.setattr(ops, "AlltoAll", AlltoAll)
    monkeypatch.setattr(transports, "_on_cpu", lambda: False)
    return office


def on_all_ranks(post, compute):
    """compute(rank) of every rank, in the round in which all have sent."""
    for _ in range(2):
        results = []
        for rank in range(RANKS):
            post.rank = rank
            results.append(compute(rank))
    return results


def group_of(rank):
    return ProcessGroup(tuple(range(RANKS)), rank, "group")


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
@pytest.mark.parametrize("rows_out", [15, 20])
def test_uneven_blocks(post, sent, rows_out):
    random = np.random.default_rng(0)
    rows_in = int(sent.sum(1).max()) + 2
    x = random.standard_normal((RANKS, rows_in, COLUMNS)).astype(np.float32)
    matrix = Tensor(sent.astype(np.int32))

    def compute(rank):
        cell = transports.all_to_all(group_of(rank), rows_in, rows_out)
        return cell(Tensor(x[rank]), matrix).asnumpy()

    for rank, got in enumerate(on_all_ranks(post, compute)):
        begin = np.cumsum(sent, 1) - sent
        expected = np.concatenate(
            [x[s, begin[s, rank] : begin[s, rank] + sent[s, rank]] for s in range(RANKS)]
        )
        assert got.shape == (rows_out, COLUMNS)
        np.testing.assert_array_equal(got[: len(expected)], expected)
        assert np.isfinite(got).all()


def test_equal_blocks(post):
    x = np.random.default_rng(0).standard_normal((RANKS, RANKS, 2, 4, COLUMNS)).astype(np.float32)

    def compute(rank):
        return transports.equal_all_to_all(group_of(rank))(Tensor(x[rank])).asnumpy()

    for rank, got in enumerate(on_all_ranks(post, compute)):
        np.testing.assert_array_equal(got, x[:, rank])
