"""Packing: nothing lost, nothing split, little padding; positions begin anew with each sample."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.data.conversations import sample_packing as layout
from mixtral_ms.data.conversations.sample_encoder import Sample
from mixtral_ms.data.conversations.sample_packing import lay_out, one_a_record, pack
from mixtral_ms.data.loader.batch import Batch

LENGTH = 20


def samples_of(sizes):
    """Samples whose ids say which sample they are of, their second half supervised."""
    return [
        Sample(np.full(size, number + 1, np.int32), np.arange(size) >= (size + 1) // 2)
        for number, size in enumerate(sizes)
    ]


@given(st.lists(st.integers(1, LENGTH), max_size=60), st.integers(1, 5))
def test_each_sample_is_in_one_record_whole(sizes, open_records):
    samples = samples_of(sizes)
    before, layout._OPEN_RECORDS = layout._OPEN_RECORDS, open_records  # noqa: SLF001
    try:
        records = list(pack(samples, LENGTH))
        assert [[one.ids[0] for one in record] for record in pack(samples, LENGTH)] == [
            [one.ids[0] for one in record] for record in records
        ]
    finally:
        layout._OPEN_RECORDS = before  # noqa: SLF001
    assert sorted(int(one.ids[0]) for record in records for one in record) == list(
        range(1, len(sizes) + 1)
    )
    assert all(sum(len(one.ids) for one in record) <= LENGTH for record in records)
    if not records:
        return
    columns = lay_out(records, LENGTH, 0, packed=True)
    shape = (len(records), LENGTH)
    assert all(one.dtype == np.int32 and one.shape == shape for one in columns.values())
    ids, labels, segments = columns["input_ids"], columns["labels"], columns["segment_ids"]
    assert ((ids == 0) == (segments == 0)).all()
    assert (labels[ids == 0] == -100).all()
    for number, size in enumerate(sizes, start=1):
        index, columns_of = np.nonzero(ids == number)
        assert len(set(index)) == 1 and (np.diff(columns_of) == 1).all() and len(index) == size
        assert len(set(segments[index, columns_of])) == 1
        assert (labels[index, columns_of] == number).sum() == size - (size + 1) // 2
    for record, segment in zip(records, segments, strict=True):
        assert (
            segment[segment > 0].max() == len(record) and (np.diff(segment[segment > 0]) >= 0).all()
        )


def test_packing_fills_the_records():
    sizes = np.random.default_rng(0).integers(20, 400, 2000)
    records = list(pack(samples_of(sizes), 1025))
    assert sizes.sum() / (len(records) * 1025) > 0.97


def test_one_a_record_has_no_segments():
    columns = lay_out(list(one_a_record(samples_of([3, 5]))), 6, 9, packed=False)
    assert columns["input_ids"].tolist() == [[1, 1, 1, 9, 9, 9], [2, 2, 2, 2, 2, 9]]
    assert columns["labels"].tolist() == [[-100, -100, 1] + [-100] * 3, [-100] * 3 + [2, 2, -100]]
    assert set(columns) == {"input_ids", "labels"}


@given(st.lists(st.integers(1, 6), max_size=5))
def test_positions_count_from_each_samples_beginning(sizes):
    segments = sum(([number] * size for number, size in enumerate(sizes, start=1)), []) + [0] * 3
    batch = Batch(*[np.array([segments] * 2, np.int32)] * 3)
    expected = sum((list(range(size)) for size in sizes), []) + [0, 1, 2]
    assert batch.positions.tolist() == [expected] * 2
    assert batch.positions.dtype == np.int32
    assert Batch(batch.input_ids, batch.labels).positions is None
