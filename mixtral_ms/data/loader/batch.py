"""What the data side hands to the network."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Batch:
    """Ids and the ids that follow them.

    Attributes:
        input_ids: (B, S) int32.
        labels: (B, S) int32, the target of each position, negative where there is none.
        segment_ids: (B, S) int32 of packed samples, 1, 2, ... in each row, 0 for padding; None when
            a row is one sample.
        positions: (B, S) int32, the place of each token in its own sample; None when a row is one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.segment_ids is not None and self.positions is None:
            self.positions = _places(self.segment_ids)

    @property
    def supervised_tokens(self) -> int:
        """Number of positions that have a target."""
        return int((self.labels >= 0).sum())

    def columns(self, part: int, parts: int) -> "Batch":
        """Part number `part` of the sequence, which is cut into so many; places stay the same."""
        if parts == 1:
            return self
        length = self.input_ids.shape[1] // parts
        cut = slice(part * length, (part + 1) * length)
        every = (self.input_ids, self.labels, self.segment_ids, self.positions)
        return Batch(*(None if one is None else np.ascontiguousarray(one[:, cut]) for one in every))


def _places(segment_ids_BS: np.ndarray) -> np.ndarray:
    place_S = np.arange(segment_ids_BS.shape[1], dtype=np.int32)
    begins_BS = np.diff(segment_ids_BS, axis=1, prepend=-1) != 0
    return place_S - np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
