import os
import re
import shutil

import numpy as np
import pytest
from helpers.records import RECORDS, SEQ, loader, make, records_of
from mindspore.dataset import MindDataset

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.data.mindrecord.reader import MindRecords, find_records
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "wiki.mindrecord"
    make(path)
    return path


def test_mind_dataset_reads_what_was_written(data):
    rows = [row[0] for row in MindDataset(str(data), shuffle=False).create_tuple_iterator(
        num_epochs=1, output_numpy=True)]  # fmt: skip
    assert np.array_equal(np.stack(rows).reshape(-1), np.arange(RECORDS * (SEQ + 1)))
    assert rows[0].dtype == np.int32


def test_nothing_but_the_record_is_left_and_it_is_small(data):
    assert sorted(os.listdir(data.parent)) == [data.name, f"{data.name}.db"]
    assert data.stat().st_size < 400_000


def test_inputs_and_labels_are_shifted(data):
    first = next(loader(data, shuffle=False).batches(0))
    assert first.input_ids[1].tolist() == list(range(9, 17))
    assert first.labels[1].tolist() == list(range(10, 18))
    assert first.input_ids.dtype == first.labels.dtype == np.int32


def test_an_epoch_has_each_record_once_in_an_order_of_its_own(data):
    it = loader(data)
    epochs = [records_of(it.batches(epoch)) for epoch in (0, 1)]
    assert len(it) == RECORDS // 4
    for seen in epochs:
        assert len(set(seen)) == len(seen) == RECORDS // 4 * 4
    assert epochs[0] != epochs[1]
    assert epochs[0] == records_of(loader(data).batches(0))
    assert epochs[0] != records_of(loader(data, seed=8).batches(0))


def test_the_order_is_frozen(data):
    assert records_of(loader(data).batches(3))[:6] == [12, 15, 34, 47, 52, 37]


@pytest.mark.parametrize("start", [0, 1, 7, 12, 13])
def test_resuming_in_mid_epoch_continues_exactly(data, start):
    whole = list(loader(data).batches(2))
    resumed = list(loader(data).batches(2, start_batch=start))
    assert len(resumed) == len(whole) - start
    for got, expected in zip(resumed, whole[start:], strict=True):
        assert np.array_equal(got.input_ids, expected.input_ids)
        assert np.array_equal(got.labels, expected.labels)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches(data, world):
    alone = list(loader(data).batches(0))
    ranks = [
        list(loader(data, batch_size=4 // world, rank=rank, world=world).batches(0))
        for rank in range(world)
    ]
    for number, batch in enumerate(alone):
        shares = np.split(batch.input_ids, world)
        for share, batches in zip(shares, ranks, strict=True):
            assert np.array_equal(batches[number].input_ids, share)


def test_micro_batches_of_ranks_are_those_of_one_process(data):
    """Batch i of rank r is batch i * world + r of one process with as many rows."""
    alone = list(loader(data).batches(0))
    for rank in (0, 1):
        for number, batch in enumerate(loader(data, rank=rank, world=2).batches(0)):
            assert np.array_equal(batch.input_ids, alone[2 * number + rank].input_ids)


def test_a_part_of_the_sequence_keeps_its_positions():
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2, 2]], np.int32)
    whole = Batch(ids, ids + 1, segments)
    parts = [whole.columns(part, 2) for part in (0, 1)]
    for name in ("input_ids", "labels", "segment_ids", "positions"):
        joined = np.concatenate([getattr(one, name) for one in parts], 1)
        assert np.array_equal(joined, getattr(whole, name))
    assert parts[1].positions.tolist() == [[4, 0, 1, 0], [3, 4, 5, 6]]
    assert whole.columns(0, 1) is whole


def test_evaluation_keeps_order_and_last_batch(data):
    it = loader(data, shuffle=False, keep_partial=True)
    batches = list(it.batches(0))
    assert len(it) == len(batches) == 14
    assert len(batches[-1].input_ids) == 1
    assert records_of(batches) == list(range(RECORDS))


def test_ranks_get_equal_shapes_in_the_last_partial_batch(data):
    last = [
        list(loader(data, shuffle=False, keep_partial=True, rank=rank, world=2).batches(0))[-1]
        for rank in (0, 1)
    ]
    assert [len(one.input_ids) for one in last] == [3, 3]  # 53 = 6 * 8 + 5
    assert records_of([last[0]]) == [48, 49, 50]
    assert records_of([last[1]])[:2] == [51, 52]
    assert (last[1].labels[2] == -100).all()
    assert last[1].supervised_tokens == 2 * SEQ


def test_leaving_an_epoch_early_leaves_no_thread(data):
    import threading  # noqa: PLC0415

    before = threading.active_count()
    batches = loader(data).batches(0)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_padding_is_no_target(tmp_path):
    rows = np.array([[1, 5, 6, 0, 0, 0, 0, 0, 0]], np.int32)
    make(tmp_path / "a.mindrecord", rows)
    for pad, labels in ((0, [5, 6] + [-100] * 6), (-1, [5, 6] + [0] * 6)):
        batch = next(loader(tmp_path, batch_size=1, pad_token_id=pad).batches(0))
        assert batch.labels[0].tolist() == labels
        assert batch.input_ids[0].tolist() == [1, 5, 6, 0, 0, 0, 0, 0]


def test_a_labels_column_is_used_when_asked_for(tmp_path):
    rows = np.arange(2 * (SEQ + 1), dtype=np.int32).reshape(2, -1)
    labels = np.where(rows % 2, rows, -100).astype(np.int32)
    make(tmp_path / "qa.mindrecord", rows, labels=labels)
    columns = ["input_ids", "labels"]
    batch = next(loader(tmp_path, input_columns=columns, batch_size=2, shuffle=False).batches(0))
    assert np.array_equal(batch.labels, labels[:, 1:])
    assert np.array_equal(batch.input_ids, rows[:, :-1])


def test_num_samples_limits_the_records(data):
    it = loader(data, num_samples=9, keep_partial=True)
    assert sorted(records_of(it.batches(0))) == list(range(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_length": SEQ + 1}, r"record 0 .* 9 input_ids, .*seq_length 9 .* 10.* to 8"),
        ({"seq_length": SEQ - 1}, r"record 0 .* 9 input_ids, .*seq_length 7 .* 8"),
        ({"vocab_size": 9}, r"record 52 .* id 476.* vocab_size 9|record 0 .* vocab_size 9"),
        ({"batch_size": 60}, r"53 records.* one batch of 60 on"),
        ({"input_columns": ["input_ids", "labels"]}, "no column 'labels'"),
        ({"input_columns": ["text"]}, r"\['text'\] must be"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        loader(data, **options)


def test_an_unfit_record_in_the_middle_is_named_when_read(tmp_path):
    rows = np.ones((5, SEQ + 1), np.int32)
    rows[3, 4] = 32000
    make(tmp_path / "a.mindrecord", rows)
    it = loader(tmp_path, batch_size=1, shuffle=False, vocab_size=32000)
    with pytest.raises(UserError, match=r"record 3 .* id 32000, .* vocab_size 32000"):
        list(it.batches(0))


VOCAB = 96


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("input_ids", -1, "id -1, but ids must be 0 or more and below vocab_size 96"),
        ("input_ids", -100, "id -100, but"),
        ("input_ids", VOCAB, "id 96, but"),
        ("input_ids", 2_000_000_000, "id 2000000000, but"),
        ("input_ids", VOCAB - 1, None),
        (
            "labels",
            2_000_000_000,
            "label 2000000000, but labels must be .*, or ignore_token_id -10",
        ),
        ("labels", VOCAB, "label 96, but"),
        ("labels", -5, "label -5, but"),
        ("labels", -2_147_483_648, "label -2147483648, but"),
        ("labels", VOCAB - 1, None),
        ("labels", -100, None),
        ("segment_ids", -1, "segment_ids that are negative"),
        ("segment_ids", 1, "segment_ids .* come again after others"),
        ("segment_ids", 2, None),
        ("segment_ids", 2_000_000_000, None),
    ],
)
@pytest.mark.parametrize("keep_partial", [False, True])  # training, and evaluation
def test_every_column_is_held_to_what_it_means(tmp_path, column, value, message, keep_partial):
    """A value at one place of the fourth record, which is the second one of the second file."""
    shape = (2, SEQ + 1)
    columns = ("input_ids", "labels", "segment_ids")
    for name in ("a", "b"):
        arrays = {one: np.full(shape, 7, np.int32) for one in columns}
        arrays["segment_ids"][:] = [1, 1, 1, 2, 2, 2, 2, 2, 0]
        if name == "b":
            arrays[column][1, 4:8] = value
        make(tmp_path / f"{name}.mindrecord", arrays.pop("input_ids"), **arrays)
    given = {"input_columns": list(columns[:2]), "batch_size": 1, "vocab_size": VOCAB}
    if message is None:
        data = loader(tmp_path, shuffle=False, keep_partial=keep_partial, **given)
        assert sum(len(one.input_ids) for one in data.batches(0)) == 4
        return
    with pytest.raises(UserError, match=rf"record 1 of {tmp_path}/b.mindrecord has .*{message}"):
        list(loader(tmp_path, shuffle=False, keep_partial=keep_partial, **given).batches(0))


def test_partitions_make_one_data_set_wherever_they_are(tmp_path):
    make(tmp_path / "wiki", partitions=3)
    for where in (tmp_path / "wiki", tmp_path):
        assert sorted(records_of(loader(where, batch_size=1).batches(0))) == list(range(RECORDS))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    before = loader(tmp_path / "wiki").fingerprint
    for name in [one for one in os.listdir(tmp_path) if one.startswith("wiki")]:
        shutil.move(tmp_path / name, moved)
    assert loader(moved).fingerprint == before
    (moved / "wiki1").unlink()
    with pytest.raises(UserError, match=r"one of 3 partitions, but wiki1 is missing"):
        loader(moved)


def test_fingerprint_tells_data_apart(data, tmp_path):
    rows = np.arange(RECORDS * (SEQ + 1), dtype=np.int32).reshape(RECORDS, -1).copy()
    make(tmp_path / "same.mindrecord", rows)
    rows[-1, -1] = 3
    make(tmp_path / "last.mindrecord", rows)
    same, last = (loader(tmp_path / f"{one}.mindrecord") for one in ("same", "last"))
    assert last.fingerprint != same.fingerprint
    assert loader(data).fingerprint == loader(data).fingerprint
    assert loader(data, num_samples=20).fingerprint != loader(data).fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.remove(f"{path}.db"), "no index"),
        (lambda path: os.truncate(path, 5), "not a MindRecord"),
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            "is damaged .it has .* of at least",
        ),
        (lambda path: path.write_text("hello"), "not a MindRecord"),
        (lambda path: path.unlink(), "no MindRecord at"),
    ],
)
def test_damaged_data_is_named(tmp_path, damage, message):
    path = tmp_path / "a.mindrecord"
    make(path, np.ones((3000, SEQ + 1), np.int32))
    damage(path)
    with pytest.raises(UserError, match=message):
        loader(path)


def test_a_renamed_record_is_named(tmp_path):
    make(tmp_path / "a.mindrecord")
    for end in ("", ".db"):
        os.rename(tmp_path / f"a.mindrecord{end}", tmp_path / f"b.mindrecord{end}")
    with pytest.raises(UserError, match=r"renamed.*'a.mindrecord'"):
        loader(tmp_path)


def test_no_data_is_named(tmp_path):
    with pytest.raises(UserError, match="--train_data"):
        find_records("")
    with pytest.raises(UserError, match="no MindRecord at"):
        find_records(tmp_path)


@pytest.mark.parametrize(
    ("asked", "columns", "said"),
    [
        (["input_ids"], ["labels"], "not read, .*: labels; every id is learnt"),
        (["input_ids", "labels"], ["labels", "weights"], "not read, .*: weights\n"),
        (["input_ids", "labels"], ["labels", "segment_ids"], None),
        (["input_ids"], [], None),
    ],
)
def test_columns_that_are_not_read_are_said(tmp_path, capsys, asked, columns, said):
    rows = np.ones((4, SEQ + 1), np.int32)
    make(tmp_path / "a", rows, **dict.fromkeys(columns, rows))
    loader(tmp_path, input_columns=asked)
    printed = capsys.readouterr().err
    assert re.search(rf"{tmp_path}/a: {said}", printed) if said else printed == ""


@pytest.mark.parametrize("packed", ["a", "b"])
def test_packed_records_beside_others_are_refused(tmp_path, packed):
    """Whichever comes first: without segments packed samples would see each other."""
    rows = np.ones((4, SEQ + 1), np.int32)
    for name in ("a", "b"):
        make(tmp_path / name, rows, **({"segment_ids": rows} if name == packed else {}))
    other = "b" if packed == "a" else "a"
    with pytest.raises(UserError, match=f"/{other} has no column 'segment_ids' .*or others"):
        loader(tmp_path)


def test_data_that_is_given_twice_is_said(data, capsys):
    records = MindRecords([data, data], ["input_ids"])
    assert len(records) == 2 * RECORDS
    assert f"{data} is in the list of data more than once" in capsys.readouterr().err


@pytest.mark.parametrize("template", [5, [], "vicuna", {"name": 3}, {"name": "x"}, {}])
def test_a_template_in_a_header_that_is_none(tmp_path, template):
    with RecordWriter(tmp_path / "a", facts={"chat_template": template}) as writer:
        writer.write(input_ids=np.ones((4, SEQ + 1), np.int32))
    with pytest.raises(UserError, match=f"{tmp_path}: 'chat_template' in the header"):
        loader(tmp_path)
