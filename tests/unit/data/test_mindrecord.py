"""MindRecords as they are written, and read again as MindSpore reads them."""

import os

import numpy as np
import pytest
from helpers.records import loader, make
from mindspore.dataset import MindDataset
from mindspore.mindrecord import FileWriter

from mixtral_ms.data.mindrecord.reader import MindRecords, find_records
from mixtral_ms.data.mindrecord.record_header import read_header
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import UserError


def mindspore_reads(files, columns):
    data = MindDataset([str(one) for one in files], columns_list=columns, shuffle=False)
    return list(data.create_tuple_iterator(num_epochs=1, output_numpy=True))


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("columns", [("input_ids",), ("input_ids", "labels", "segment_ids")])
def test_records_are_those_that_mindspore_reads(tmp_path, partitions, columns):
    """In the same order, of integers of all widths, in pages that are filled."""
    dice = np.random.default_rng(1)
    limits = 2 ** dice.integers(0, 32, (len(columns), 2000, 23))
    ids = (dice.random(limits.shape) * limits - limits // 2).astype(np.int32)
    ids[:, 0, :4] = np.iinfo(np.int32).min, np.iinfo(np.int32).max, -128, 127
    with RecordWriter(tmp_path / "all", columns, partitions=partitions) as writer:
        writer.write(**dict(zip(columns, ids, strict=True)))
    records = MindRecords(tmp_path, columns[:2])
    wanted = mindspore_reads(writer.files, list(columns))
    for got, record in zip(records.read(list(range(2000))), wanted, strict=True):
        assert np.array_equal(got, record)


def test_records_of_others_are_those_that_mindspore_reads(tmp_path):
    """With columns of other types between ours, as written without our layout of small files."""
    schema = {
        "text": {"type": "string"},
        "image": {"type": "bytes"},
        "labels": {"type": "int32", "shape": [-1]},
        "wide": {"type": "int64", "shape": [-1]},
        "weight": {"type": "float32", "shape": [-1]},
        "input_ids": {"type": "int32", "shape": [9]},
        "label": {"type": "int32"},
    }
    writer = FileWriter(str(tmp_path / "theirs.mindrecord"))
    writer.add_schema(schema, "theirs")
    writer.write_raw_data(
        [
            {
                "text": "a" * number,
                "image": bytes(number % 5),
                "labels": np.arange(9, dtype=np.int32) * number,
                "wide": np.full(3, 2**40 + number),
                "weight": np.ones(number % 3 + 1, np.float32),
                "input_ids": np.arange(9, dtype=np.int32) + number,
                "label": number,
            }
            for number in range(40)
        ]
    )
    writer.commit()
    columns = ["input_ids", "labels"]
    records = MindRecords(tmp_path, columns)
    wanted = mindspore_reads([tmp_path / "theirs.mindrecord"], columns)
    assert len(records) == len(wanted) == 40
    for got, record in zip(records.read(list(range(40))), wanted, strict=True):
        assert np.array_equal(got, record)


def test_an_existing_output_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "wiki"
    make(path, partitions=2)
    with pytest.raises(UserError, match="wiki0 exists; give --overwrite"):
        make(path, partitions=3)
    make(path, np.ones((2, 5), np.int32), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["wiki", "wiki.db"]


def test_another_set_with_a_similar_name_is_left_alone(tmp_path):
    make(tmp_path / "wiki4096")
    make(tmp_path / "wiki", overwrite=True)
    make(tmp_path / "wiki", overwrite=True)
    assert len(find_records(tmp_path)) == 2


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.mindrecord"
    make(path)
    before = path.read_bytes()
    with (
        pytest.raises(RuntimeError, match="disk full"),
        RecordWriter(path, overwrite=True) as writer,
    ):
        writer.write(input_ids=np.ones((3, 4), np.int32))
        raise RuntimeError("disk full")
    assert path.read_bytes() == before
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    "rows",
    [np.ones((2, 3), np.int64), np.ones((2, 3), np.float32), np.ones(3, np.int32)],
)
def test_records_that_mindrecord_would_drop_are_an_error(tmp_path, rows):
    with (
        pytest.raises(ValueError, match="not int32 of two axes"),
        RecordWriter(tmp_path / "a") as writer,
    ):
        writer.write(input_ids=rows)
    assert not os.listdir(tmp_path)


def test_records_of_another_length_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="unlike"), RecordWriter(tmp_path / "a") as writer:
        writer.write(input_ids=np.ones((2, 3), np.int32))
        writer.write(input_ids=np.ones((2, 4), np.int32))


def test_records_that_mindrecord_loses_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("mixtral_ms.data.mindrecord.writer.RecordFile", lambda path: [path])
    with pytest.raises(RuntimeError, match="kept 1 of 53 records"):
        make(tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_more_data_than_the_small_layout_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("mixtral_ms.data.mindrecord.writer._SMALL_BYTES", 1000)
    path = tmp_path / "big.mindrecord"
    pairs = np.arange(600, dtype=np.int32).reshape(300, 2)
    with RecordWriter(path) as writer:
        for start in range(0, 300, 30):
            writer.write(input_ids=pairs[start : start + 30])
    assert read_header(path).page_size == 1 << 25
    it = loader(path, seq_length=1, batch_size=1, shuffle=False)
    assert [int(one.input_ids[0, 0]) for one in it.batches(0)] == list(range(0, 600, 2))


def test_long_rows_get_pages_that_hold_them(tmp_path):
    rows = np.random.default_rng(0).integers(0, 32000, (3, 400_001), dtype=np.int32)
    make(tmp_path / "long.mindrecord", rows)
    batch = next(loader(tmp_path, seq_length=400_000, batch_size=3, shuffle=False).batches(0))
    assert np.array_equal(batch.input_ids, rows[:, :-1])


@pytest.mark.parametrize(
    ("name", "partitions", "message"),
    [
        ("a:b", 1, "cannot have a file named 'a:b'"),
        ("a", 1001, "1001 partitions"),
        ("", 1, "folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused(tmp_path, name, partitions, message):
    with pytest.raises(UserError, match=message):
        RecordWriter(tmp_path / name, partitions=partitions)
