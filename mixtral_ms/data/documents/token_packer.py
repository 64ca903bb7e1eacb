"""Pack a stream of documents' ids into rows of equal length."""

import numpy as np


class TokenPacker:
    """Joins ids in the order they come and cuts the stream into rows of `row_length` ids.

    Documents follow one another without padding; a document may begin in one row and end in the
    next. What does not fill a last row stays `pending`.
    """

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.tokens = 0
        self.pending = 0
        self._parts: list[np.ndarray] = []

    @property
    def ready(self) -> int:
        """Whole rows that can be taken."""
        return self.pending // self.row_length

    def add(self, *parts: np.ndarray) -> None:
        """Append ids, each part int32 (tokens,), to the stream."""
        self._parts += parts
        count = sum(map(len, parts))
        self.tokens += count
        self.pending += count

    def take(self, limit: int | None = None) -> np.ndarray:
        """Remove and return the whole rows, at most `limit`: int32 (rows, row_length)."""
        rows = self.ready if limit is None else min(limit, self.ready)
        used = rows * self.row_length
        stream = np.concatenate(self._parts) if self._parts else np.empty(0, np.int32)
        self._parts = [stream[used:].copy()]
        self.pending = len(self._parts[0])
        return stream[:used].reshape(rows, self.row_length)
