"""What the data side hands to the network."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Batch:
    """Ids and the ids that follow them.

    Attributes:
        input_ids: (B, S) int32.
        labels: (B, S) int32, the target of each position, negative where there is none.
    """

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def supervised_tokens(self) -> int:
        """Number of positions that have a target."""
        return int((self.labels >= 0).sum())
