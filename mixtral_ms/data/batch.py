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
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray | None = None

    @property
    def supervised_tokens(self) -> int:
        """Number of positions that have a target."""
        return int((self.labels >= 0).sum())

    @property
    def positions(self) -> np.ndarray | None:
        """(B, S) int32, the place of each token in its own sample; None when a row is one."""
        if self.segment_ids is None:
            return None
        place_S = np.arange(self.segment_ids.shape[1], dtype=np.int32)
        begins_BS = np.diff(self.segment_ids, axis=1, prepend=-1) != 0
        return place_S - np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
