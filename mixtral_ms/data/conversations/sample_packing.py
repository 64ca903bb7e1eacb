"""Sample packing: records of equal length, with one sample each or several.

Legend: B records, N ids of a record (seq_length + 1).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mixtral_ms.data.conversations.sample_encoder import Sample

IGNORED = -100
"""Label of an id that is no target, as MindFormers writes it."""

Record = list[Sample]

_OPEN_RECORDS = 128


def lay_out(
    records: Sequence[Record], record_length: int, pad_id: int, *, packed: bool
) -> dict[str, np.ndarray]:
    """Columns of some records, each int32 (B, N).

    `input_ids` filled up with `pad_id`; `labels`, the supervised ids at their own positions
    (whoever trains shifts both), IGNORED elsewhere; and when `packed`, `segment_ids`: 1, 2, ... for
    the samples of a record, 0 for padding.
    """
    shape = (len(records), record_length)
    ids_BN = np.full(shape, pad_id, np.int32)
    labels_BN = np.full(shape, IGNORED, np.int32)
    segments_BN = np.zeros(shape, np.int32)
    for index, record in enumerate(records):
        start = 0
        for segment, sample in enumerate(record, start=1):
            end = start + len(sample.ids)
            ids_BN[index, start:end] = sample.ids
            np.copyto(labels_BN[index, start:end], sample.ids, where=sample.supervised)
            segments_BN[index, start:end] = segment
            start = end
    columns = {"input_ids": ids_BN, "labels": labels_BN}
    return {**columns, "segment_ids": segments_BN} if packed else columns


def one_a_record(samples: Iterable[Sample]) -> Iterator[Record]:
    """Each sample in a record of its own."""
    for sample in samples:
        yield [sample]


def pack(samples: Iterable[Sample], record_length: int) -> Iterator[Record]:
    """Samples of at most `record_length` ids, first fit, into records with as little padding.

    A fixed number of records is open at a time; when one more is needed, the fullest is given out.
    So memory is bounded and the same samples always make the same records.
    """
    records: list[Record] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.ids)
        index = next((at for at, free in enumerate(room) if free >= size), None)
        if index is None:
            if len(records) == _OPEN_RECORDS:
                fullest = room.index(min(room))
                del room[fullest]
                yield records.pop(fullest)
            index = len(records)
            records.append([])
            room.append(record_length)
        records[index].append(sample)
        room[index] -= size
    yield from records
