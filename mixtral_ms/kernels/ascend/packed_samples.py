"""Packed samples by their ends, as Ascend's attention takes them in the layout TND.

The operator needs the ends on the host: so the host counts them, and no graph makes it wait.

Legend: B batch, S positions of this rank, M entries of the operator's lists.
"""

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.attention import AttentionSizes, PackedSamples
from mixtral_ms.parallel.grid.mesh import ProcessGroup

_MOST_ENDS = 1024  # that the operator takes
_SHORTEST_MEAN = 8  # tokens: as many more samples would cost attention more than they are worth


class SampleEnds(PackedSamples):
    """Where each sample ends among all queries, and among all keys.

    The graph's shapes are fixed and no sample may be empty, so M tokens of filler follow the batch:
    each entry that is not needed has one of them, the last entry the rest.

    Where ranks split the sequence, a sample may have begun on an earlier one. Its keys there count
    to it; those of other samples are an entry of their own, with a filler for a query, and another
    for a key in case there are none. So each row of such a part has a filler in front (`fronts`).

    Args:
        batch_size: B.
        sizes: of this rank's part of the sequence.
        context: the ranks that split it.
    """

    def __init__(self, batch_size: int, sizes: AttentionSizes, context: ProcessGroup) -> None:
        super().__init__()
        self.length = sizes.seq_length
        self.first = context.index * self.length
        self.fronts = batch_size if self.first > 0 else 0
        tokens = batch_size * self.length
        self.most = min(_MOST_ENDS, tokens // _SHORTEST_MEAN + 2 + self.fronts)
        self.limit = self.most - 1 - self.fronts

    def prepared(self, segment_ids_BS: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """Ends, int64, rising up to the last token of filler.

        Returns:
            (M), of queries and keys alike; where keys of other ranks come before, (2, M).
        """
        batch, length = segment_ids_BS.shape
        is_end = np.ones((batch, length), bool)
        is_end[:, :-1] = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
        own = np.arange(1, length + 1)
        if self.first == 0:
            return self._filled_up(is_end, own[None])
        is_end = np.concatenate([np.ones((batch, 1), bool), is_end], 1)
        others_B1 = self.first - np.minimum(positions_BS[:, :1], self.first)
        keys = np.concatenate([1 + others_B1, np.tile(1 + self.first + own, (batch, 1))], 1)
        queries = np.concatenate([[1], 1 + own])[None]
        return np.stack([self._filled_up(is_end, queries), self._filled_up(is_end, keys)])

    def _filled_up(self, is_end: np.ndarray, number_in_row: np.ndarray) -> np.ndarray:
        batch = len(is_end)
        each = int(number_in_row[0, -1])
        ends = (number_in_row + each * np.arange(batch)[:, None])[is_end]
        missing = self.most - len(ends)
        tokens = batch * each
        filler = tokens + np.arange(1, missing + 1)
        filler[-1] = tokens + self.most
        return np.concatenate([ends, filler]).astype(np.int64)

    def construct(self, ends: Tensor) -> Tensor:
        """Nothing is left to do."""
        if ends.dtype != mstype.int64:
            raise ValueError("packed samples go to Ascend's attention as `prepared` gives them")
        return ends
