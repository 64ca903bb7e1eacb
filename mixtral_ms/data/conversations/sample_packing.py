"""Samples laid out in rows of equal length, one a row or several.

Legend: B rows, N ids of a row (seq_length + 1).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mixtral_ms.data.conversations.sample_encoder import Sample

IGNORED = -100
"""Label of an id that is no target, as MindFormers writes it."""

Row = list[Sample]

_OPEN_ROWS = 128


def lay_out(
    rows: Sequence[Row], row_length: int, pad_id: int, *, packed: bool
) -> dict[str, np.ndarray]:
    """Columns of some rows, each int32 (B, N).

    `input_ids` filled up with `pad_id`; `labels`, the supervised ids in their own places (whoever
    trains shifts both), IGNORED elsewhere; and when `packed`, `segment_ids`: 1, 2, ... for the
    samples of a row, 0 for padding.
    """
    shape = (len(rows), row_length)
    ids_BN = np.full(shape, pad_id, np.int32)
    labels_BN = np.full(shape, IGNORED, np.int32)
    segments_BN = np.zeros(shape, np.int32)
    for place, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample.ids)
            ids_BN[place, start:end] = sample.ids
            np.copyto(labels_BN[place, start:end], sample.ids, where=sample.supervised)
            segments_BN[place, start:end] = segment
            start = end
    columns = {"input_ids": ids_BN, "labels": labels_BN}
    return {**columns, "segment_ids": segments_BN} if packed else columns


def one_a_row(samples: Iterable[Sample]) -> Iterator[Row]:
    """Each sample in a row of its own."""
    for sample in samples:
        yield [sample]


def pack(samples: Iterable[Sample], row_length: int) -> Iterator[Row]:
    """Samples of at most `row_length` ids, first fit, into rows with as little padding.

    A fixed number of rows is open at a time; when one more is needed, the fullest is given out. So
    memory is bounded and the same samples always make the same rows.
    """
    rows: list[Row] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.ids)
        place = next((at for at, free in enumerate(room) if free >= size), None)
        if place is None:
            if len(rows) == _OPEN_ROWS:
                fullest = room.index(min(room))
                del room[fullest]
                yield rows.pop(fullest)
            place = len(rows)
            rows.append([])
            room.append(row_length)
        rows[place].append(sample)
        room[place] -= size
    yield from rows
