"""What Ascend's attention needs to know of packed samples: made once, for all layers.

Legend: B batch, S positions of this rank, W keys that this rank may see, T = B * S tokens, M most
samples and a filler.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.attention import AttentionSizes
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.graph_primitives import running_sum
from mixtral_ms.parallel.grid.mesh import ProcessGroup

_MOST_ENDS = 1024  # that the operator takes
_SHORTEST_MEAN = 8  # tokens: as many more samples would cost attention more than they are worth


def most_samples(tokens: int) -> int:
    """M: samples that a micro batch of so many tokens may hold, and one that is filler."""
    return min(_MOST_ENDS, tokens // _SHORTEST_MEAN + 2)


class SampleEnds(nn.Cell):
    """Where each sample ends in the row of all tokens, as the layout TND wants it.

    The graph's shapes are fixed and no sample may be empty: M tokens of filler follow the batch, of
    which each sample that is not there has one and the last one the rest.
    """

    def __init__(self, batch_size: int, seq_length: int) -> None:
        super().__init__()
        self.tokens = batch_size * seq_length
        self.most = most_samples(self.tokens)
        self.limit = self.most - 1
        last = np.zeros((batch_size, seq_length), bool)
        last[:, -1] = True
        self.is_last_BS = Tensor(last)
        self.numbers_T = Tensor(np.arange(1, self.tokens + 1, dtype=np.int32))
        self.numbers_M = Tensor(np.arange(self.most, dtype=np.int32))
        is_filler_end = np.arange(self.most) == self.most - 1
        self.is_filler_end_M = Tensor(is_filler_end)
        self.scatter = ops.ScatterNd()

    def construct(self, segment_ids_BS: Tensor) -> Tensor:
        """Returns ends_M, int64, rising up to T + M."""
        following = ops.cat((segment_ids_BS[:, 1:], segment_ids_BS[:, :1]), 1)
        is_end = ops.logical_or(ops.not_equal(segment_ids_BS, following), self.is_last_BS)
        is_end_T = ops.cast(ops.reshape(is_end, (-1,)), mstype.int32)
        passed_T = running_sum(is_end_T, 0)
        samples = passed_T[self.tokens - 1]
        # tokens that end no sample are written behind the last one, and cut off again
        index_T = is_end_T * (passed_T - 1) + (1 - is_end_T) * self.most
        ends = self.scatter(
            ops.reshape(index_T, (-1, 1)), self.numbers_T * is_end_T, (self.most + 1,)
        )
        filler = self.tokens + 1 + self.numbers_M - samples
        ends_M = ops.where(self.numbers_M < samples, ends[: self.most], filler)
        ends_M = ops.where(
            self.is_filler_end_M, ops.full_like(ends_M, self.tokens + self.most), ends_M
        )
        return ops.cast(ends_M, mstype.int64)


class HiddenKeys(nn.Cell):
    """The mask of packed samples where they cannot go by their ends: True hides a key.

    Args:
        sizes: of this rank's part of the sequence.
        context: the ranks that split it.
    """

    def __init__(self, sizes: AttentionSizes, context: ProcessGroup) -> None:
        super().__init__()
        first = context.index * sizes.seq_length
        self.keys, self.window, self.limit = first + sizes.seq_length, sizes.window, None
        self.positions_S = Tensor(np.arange(first, self.keys, dtype=np.int32))
        self.positions_W = Tensor(np.arange(self.keys, dtype=np.int32))
        self.gather = transports.all_gather(context) if context.size > 1 else None

    def construct(self, segment_ids_BS: Tensor) -> Tensor:
        """Returns (B, 1, S, W), bool."""
        keys_BW = segment_ids_BS
        if self.gather is not None:
            parts = self.gather(ops.cast(segment_ids_BS, mstype.float32))
            whole = ops.cast(ops.cat(ops.unbind(parts), 1), segment_ids_BS.dtype)
            keys_BW = whole[:, : self.keys]
        other = ops.not_equal(ops.expand_dims(segment_ids_BS, 2), ops.expand_dims(keys_BW, 1))
        hidden = hidden_positions(self.positions_S, self.positions_W, self.window)
        return ops.expand_dims(ops.logical_or(other, hidden), 1)


def hidden_positions(positions_S: Tensor, positions_W: Tensor, window: int | None) -> Tensor:
    """(S, W), True where a query must not see a key: later ones, and those behind the window."""
    query_S1, key_1W = ops.expand_dims(positions_S, 1), ops.expand_dims(positions_W, 0)
    later = query_S1 < key_1W
    if window is None:
        return later
    return ops.logical_or(later, query_S1 - key_1W >= window)
