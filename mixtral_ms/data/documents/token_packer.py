"""Document packing: a stream of documents' ids cut into records of equal length."""

import numpy as np


class TokenPacker:
    """Joins ids in the order they come and cuts the stream into records of `record_length` ids.

    Documents follow one another without padding; a document may begin in one record and end in the
    next. What does not fill a last record stays `pending`.
    """

    def __init__(self, record_length: int) -> None:
        self.record_length = record_length
        self.tokens = 0
        self.pending = 0
        self._parts: list[np.ndarray] = []

    @property
    def ready(self) -> int:
        """Whole records that can be taken."""
        return self.pending // self.record_length

    def add(self, *parts: np.ndarray) -> None:
        """Append ids, each part int32 (tokens,), to the stream."""
        self._parts += parts
        count = sum(map(len, parts))
        self.tokens += count
        self.pending += count

    def take(self, limit: int | None = None) -> np.ndarray:
        """Remove and return the whole records, at most `limit`: int32 (records, record_length)."""
        records = self.ready if limit is None else min(limit, self.ready)
        used = records * self.record_length
        stream = np.concatenate(self._parts) if self._parts else np.empty(0, np.int32)
        self._parts = [stream[used:].copy()]
        self.pending = len(self._parts[0])
        return stream[:used].reshape(records, self.record_length)
