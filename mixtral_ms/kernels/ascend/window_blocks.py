"""A sliding window in blocks of queries, each with the keys that some query of it may see.

For what the operator's own window is not documented for: packed samples, and more keys than
queries. The blocks are rows of one batch and need one mask of their own size, never S x S.

Legend: B batch, S positions of this rank, W keys that this rank may see, n blocks of the sequence,
C queries of a block, p blocks of keys before it, D width of all heads.
"""

import numpy as np
from mindspore import Tensor, nn, ops

from mixtral_ms.kernels.cells.attention import PackedSamples, visible
from mixtral_ms.parallel.grid.mesh import ProcessGroup

_MOST_QUERIES = 2048  # of a block: a mask of it and of a window of 4,096 has 12 MB
_NO_SAMPLE = -1  # of keys before the sequence begins


class WindowBlocks(nn.Cell):
    """The blocks of keys, or of values, that belong to the blocks of queries.

    Args:
        length: S.
        window: a position sees itself and so many less one before it.
    """

    def __init__(self, length: int, window: int) -> None:
        super().__init__()
        most = min(window, _MOST_QUERIES)
        self.queries = max(one for one in range(1, most + 1) if length % one == 0)
        self.blocks = length // self.queries
        self.earlier = -(-(window - 1) // self.queries)
        self.keys = (self.earlier + 1) * self.queries
        self.rows = (self.earlier + self.blocks) * self.queries

    def construct(self, x_BWD: Tensor) -> Tensor:
        """(B, W, D) -> (B n, (p + 1) C, D); zeros stand before the first key."""
        batch, length, width = x_BWD.shape
        if length > self.rows:
            x_BWD = x_BWD[:, length - self.rows :]
        elif length < self.rows:
            before = ops.zeros((batch, self.rows - length, width), x_BWD.dtype)
            x_BWD = ops.cat((before, x_BWD), 1)
        x = ops.reshape(x_BWD, (batch, self.earlier + self.blocks, self.queries, width))
        parts: tuple[Tensor, ...] = ()
        for shift in range(self.earlier + 1):
            parts += (x[:, shift : shift + self.blocks],)
        joined = parts[0] if self.earlier == 0 else ops.cat(parts, 2)
        return ops.reshape(joined, (batch * self.blocks, self.keys, width))


class HiddenInBlocks(PackedSamples):
    """The mask of all blocks: True hides a key.

    Args:
        length: S.
        window: as above.
        context: the ranks that split the sequence.
    """

    def __init__(self, length: int, window: int, context: ProcessGroup) -> None:
        super().__init__()
        self.cut = WindowBlocks(length, window)
        self.before = self.cut.rows - length
        queries = np.arange(self.before, self.before + self.cut.queries)
        seen = visible(queries, np.arange(self.cut.keys), window)
        self.outside = Tensor(~seen[None, None])
        first = context.index * length
        of_keys = np.zeros((1, self.cut.rows), np.int32)
        of_keys[:, : max(0, self.before - first)] = _NO_SAMPLE
        self.one_sample = Tensor(of_keys)
        """As `prepared`, where nothing is packed, of a row."""

    def prepared(self, segment_ids_BS: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """The sample of every key that some query of this rank may see, (B, p C + S).

        Of keys of earlier ranks only those of a sample that goes on here matter.
        """
        carried_B1 = positions_BS[:, :1]
        distance = np.arange(self.before, 0, -1)[None]
        earlier = np.where(distance <= carried_B1, segment_ids_BS[:, :1], _NO_SAMPLE)
        return np.concatenate([earlier, segment_ids_BS], 1).astype(np.int32)

    def construct(self, of_keys: Tensor) -> Tensor:
        """Returns (B n, 1, C, (p + 1) C), bool."""
        key_ids = self.cut(ops.expand_dims(of_keys, 2))[:, :, 0]
        query_ids = ops.reshape(of_keys[:, self.before :], (-1, self.cut.queries))
        other = ops.not_equal(ops.expand_dims(query_ids, 2), ops.expand_dims(key_ids, 1))
        return ops.logical_or(ops.expand_dims(other, 1), self.outside)
