"""What the data side hands to the network."""

from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass
class Batch:
    """Ids and the ids that follow them.

    Attributes:
        input_ids: (B, S) int32.
        labels: (B, S) int32, the target of each position, negative where there is none.
        segment_ids: (B, S) int32 of packed samples, 1, 2, ... in each sequence, 0 for padding; None
            when a sequence is one sample.
        positions: (B, S) int32, of each token in its own sample; None when a sequence is one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.segment_ids is not None and self.positions is None:
            self.positions = _positions(self.segment_ids)

    @property
    def supervised_tokens(self) -> int:
        """Number of positions that have a target."""
        return int((self.labels >= 0).sum())

    @property
    def samples(self) -> int:
        """Runs of the same segment: packed samples, and what pads each sequence."""
        if self.segment_ids is None:
            return len(self.input_ids)
        return len(self.input_ids) + int((np.diff(self.segment_ids, axis=1) != 0).sum())

    def columns(self, part: int, parts: int) -> "Batch":
        """Part number `part` of the sequence, which is cut into so many; positions stay."""
        if parts == 1:
            return self
        length = self.input_ids.shape[1] // parts
        cut = slice(part * length, (part + 1) * length)
        arrays = self.arrays().items()
        return replace(self, **{name: np.ascontiguousarray(one[:, cut]) for name, one in arrays})

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by their names, those of a subclass too."""
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: array for name, array in named.items() if array is not None}


def _positions(segment_ids_BS: np.ndarray) -> np.ndarray:
    index_S = np.arange(segment_ids_BS.shape[1], dtype=np.int32)
    begins_BS = np.diff(segment_ids_BS, axis=1, prepend=-1) != 0
    return index_S - np.maximum.accumulate(np.where(begins_BS, index_S, 0), axis=1)
