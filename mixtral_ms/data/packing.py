"""Pack a stream of documents' ids into rows of equal length."""

from array import array

import numpy as np

# Converting many ids at once is three times as fast as document by document; a list of ids takes
# ten times the memory of an array, so it must stay short.
_RECENT = 1 << 16


class TokenPacker:
    """Joins ids in the order they come and cuts the stream into rows of `row_length` ids.

    Documents follow one another without padding; a document may begin in one row and end in the
    next. What does not fill a last row stays in `pending`.
    """

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.tokens = 0
        self._buffer = array("i")
        self._recent: list[int] = []

    @property
    def pending(self) -> int:
        """Ids that are packed but not taken yet."""
        return len(self._buffer) + len(self._recent)

    @property
    def ready(self) -> int:
        """Whole rows that can be taken."""
        return self.pending // self.row_length

    def add(self, ids: list[int]) -> None:
        """Append ids to the stream."""
        self._recent += ids
        self.tokens += len(ids)
        if len(self._recent) > _RECENT:
            self._compact()

    def take(self, limit: int | None = None) -> np.ndarray:
        """Remove and return the whole rows, at most `limit`: int32 (rows, row_length)."""
        rows = self.ready if limit is None else min(limit, self.ready)
        self._compact()
        used = rows * self.row_length
        taken = np.frombuffer(self._buffer[:used].tobytes(), dtype=np.int32)
        self._buffer = self._buffer[used:]
        return taken.reshape(rows, self.row_length)

    def _compact(self) -> None:
        self._buffer.extend(array("i", self._recent))
        self._recent = []
