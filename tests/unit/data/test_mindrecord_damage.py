"""Damaged MindRecords: an error that names the file, or the records as they were; no other end."""

import json
import os
import random
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from mixtral_ms.data.mindrecord.reader import MindRecords
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import UserError

RECORDS, LENGTH = 20, 9
COLUMNS = ["input_ids", "labels"]
NAME = "d.mindrecord"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a sound record, small enough to be damaged often, and its records."""
    folder = tmp_path_factory.mktemp("sound")
    ids = np.random.default_rng(0).integers(0, 40_000, (RECORDS, LENGTH), dtype=np.int32)
    with RecordWriter(folder / NAME, tuple(COLUMNS)) as writer:
        writer.write(input_ids=ids, labels=ids + 1)
    return folder, read(folder)


@pytest.fixture
def copy(sound, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(sound[0], tmp_path / "copy")


def read(path):
    records = MindRecords(path, COLUMNS)
    return [np.concatenate(one).tolist() for one in records.read(list(range(len(records))))]


def outcome(folder, sound):
    """Whether the records are "same", "refused" by an error that names a file, or which differ."""
    try:
        found = read(folder)
    except UserError as error:
        assert NAME in str(error)
        return "refused"
    if len(found) != len(sound[1]):
        return f"{len(found)} records"
    return [n for n, pair in enumerate(zip(found, sound[1], strict=True)) if pair[0] != pair[1]]


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_header(path, values):
    text = json.dumps(values).encode()
    with open(path, "r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)


def places(value, path=()):
    """Every key and item in a header."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


CHANGES = {
    "absent": None,
    "null": lambda value: None,
    "text": lambda value: "x",
    "negative": lambda value: -1,
    "one more": lambda value: value + 1 if isinstance(value, int) else [value, value],
    "beyond all files": lambda value: 10**11,
    "huge": lambda value: 1 << 62,
    "half": lambda value: 0.5,
    "a list": lambda value: [],
    "an object": lambda value: {},
    "true": lambda value: True,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_with_one_value_changed(sound, copy, change):
    """Every value of it in turn; what no reader of arrays needs may be anything."""
    path = copy / NAME
    header = header_of(path)
    refused = set()
    for place in list(places(header)):
        changed = json.loads(json.dumps(header))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if CHANGES[change] is None:
            del inner[place[-1]]
        else:
            inner[place[-1]] = CHANGES[change](inner[place[-1]])
        write_header(path, changed)
        got = outcome(copy, sound)
        assert got in ("refused", []), place
        if got == "refused":
            refused.add(place)
    for needed in ("page_size", "header_size", "page", "schema", "shard_addresses", "version"):
        assert (needed,) in refused


BYTES = {
    "one letter of a key": lambda data: data.replace(b'"page_size"', b'"pagX_size"', 1),
    "a header of half its length": lambda data: (300).to_bytes(8, "little") + data[8:],
    "a header longer than the file": lambda data: (1 << 26).to_bytes(8, "little") + data[8:],
    "a header without end": lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
    "a header of no text": lambda data: data[:20] + b"\xff\xfe" + data[22:],
    "nesting without end": lambda data: (
        (40_000).to_bytes(8, "little") + b"[" * 40_000 + data[40_008:]
    ),
    "a number of 6000 digits": lambda data: (6000).to_bytes(8, "little") + b"1" * 6000,
    "NaN": lambda data: data.replace(b"262144", b"   NaN", 1),
    "a key twice": lambda data: data.replace(b'"version"', b'"page"   ', 1),
    "half a file": lambda data: data[: len(data) // 2],
    "without its last page": lambda data: data[: (1 << 16) + 100],
    "five bytes": lambda data: data[:5],
    "zeros behind the header": lambda data: data[: 1 << 16] + bytes(len(data) - (1 << 16)),
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_damaged_data_file(sound, copy, kind):
    data = (copy / NAME).read_bytes()
    (copy / NAME).write_bytes(BYTES[kind](data))
    assert outcome(copy, sound) == "refused"


OTHERS = {
    "empty": (b"", r"is empty \(0 bytes\), not"),
    "text": (b"Once upon a time there was a record", "not a MindRecord"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
    "a web page": (b"<!doctype html><html>404", "is a web page"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "is compressed with gzip, not .*gunzip"),
    "zeros": (bytes(9000), "is nothing but zeros"),
    "Parquet": (b"PAR1" + bytes(range(100)), "is a Parquet file, not"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", [NAME, f"{NAME}.db"])
def test_a_file_of_another_kind_is_told_by_its_kind(copy, name, kind):
    data, message = OTHERS[kind]
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}:? .*{message}"):
        read(copy)


def test_files_that_change_places(copy):
    for name, other in ((NAME, "an SQLite database, not"), (f"{NAME}.db", "a MindRecord, not")):
        again = shutil.copytree(copy, copy / f"with another {name}")
        shutil.copy(copy / (NAME if name.endswith(".db") else f"{NAME}.db"), again / name)
        with pytest.raises(UserError, match=f"{name} is {other}"):
            read(again)


SQL = {
    "a record is gone": "DELETE FROM INDEXES WHERE ROW_ID=1",
    "the last record is gone": f"DELETE FROM INDEXES WHERE ROW_ID={RECORDS - 1}",
    "all are gone": "DELETE FROM INDEXES",
    "a record more": f"INSERT INTO INDEXES SELECT {RECORDS}, PAGE_ID_RAW, PAGE_OFFSET_RAW, "
    "PAGE_OFFSET_RAW_END, ROW_GROUP_ID, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END "
    "FROM INDEXES WHERE ROW_ID=0",
    "negative number": "UPDATE INDEXES SET ROW_ID=-1 WHERE ROW_ID=1",
    "numbers from 1": "UPDATE INDEXES SET ROW_ID=ROW_ID+1000; UPDATE INDEXES SET ROW_ID=ROW_ID-999",
    "two change places": "UPDATE INDEXES SET ROW_ID=-1 WHERE ROW_ID=1; "
    "UPDATE INDEXES SET ROW_ID=1 WHERE ROW_ID=5; UPDATE INDEXES SET ROW_ID=5 WHERE ROW_ID=-1",
    "another record's bytes": "UPDATE INDEXES SET (PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END) = "
    "(SELECT PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END FROM INDEXES WHERE ROW_ID=5) WHERE ROW_ID=1",
    "an end moved": "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END=PAGE_OFFSET_BLOB_END+1 WHERE ROW_ID=7",
    "an end and its follower moved": "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END="
    "PAGE_OFFSET_BLOB_END+1 WHERE ROW_ID=7; UPDATE INDEXES SET PAGE_OFFSET_BLOB="
    "PAGE_OFFSET_BLOB+1 WHERE ROW_ID=8",
    "two records in one": "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END=(SELECT PAGE_OFFSET_BLOB_END "
    "FROM INDEXES WHERE ROW_ID=8) WHERE ROW_ID=7; UPDATE INDEXES SET PAGE_OFFSET_BLOB="
    "PAGE_OFFSET_BLOB_END WHERE ROW_ID=8",
    "another page": "UPDATE INDEXES SET PAGE_ID_BLOB=1 WHERE ROW_ID=3",
    "a page of raw data": "UPDATE INDEXES SET PAGE_ID_BLOB=1",
    "a page far away": "UPDATE INDEXES SET PAGE_ID_BLOB=4611686018427387904",
    "a negative offset": "UPDATE INDEXES SET PAGE_OFFSET_BLOB=-8 WHERE ROW_ID=0",
    "text": "UPDATE INDEXES SET PAGE_OFFSET_BLOB='zero' WHERE ROW_ID=0",
    "half a number": "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END=PAGE_OFFSET_BLOB_END+0.5",
    "bytes": "UPDATE INDEXES SET PAGE_ID_BLOB=x'00ff'",
    "no table": "DROP TABLE INDEXES",
    "a view in its place": "ALTER TABLE INDEXES RENAME TO T; CREATE VIEW INDEXES AS WITH RECURSIVE "
    "n(ROW_ID) AS (SELECT 0 UNION ALL SELECT ROW_ID+1 FROM n) SELECT ROW_ID, 0 PAGE_ID_BLOB, "
    "0 PAGE_OFFSET_BLOB, 0 PAGE_OFFSET_BLOB_END FROM n",
    "no column": "ALTER TABLE INDEXES RENAME COLUMN PAGE_ID_BLOB TO P",
}


@pytest.mark.parametrize("kind", SQL)
def test_an_index_that_says_something_else(sound, copy, kind):
    with closing(sqlite3.connect(copy / f"{NAME}.db")) as index:
        index.executescript(SQL[kind])
    assert outcome(copy, sound) == "refused"


def test_an_index_of_other_records(sound, copy):
    with RecordWriter(copy / "other" / NAME, tuple(COLUMNS)) as writer:
        ids = np.full((RECORDS, LENGTH), 7, np.int32)
        writer.write(input_ids=ids, labels=ids)
    os.replace(copy / "other" / f"{NAME}.db", copy / f"{NAME}.db")
    assert outcome(copy, sound) == "refused"


@pytest.mark.parametrize("what", ["header", "records", "index"])
def test_flipped_bytes(sound, copy, what):
    """What has no checksum may change one record; never another's bytes, never the interpreter."""
    path = copy / (f"{NAME}.db" if what == "index" else NAME)
    data = path.read_bytes()
    pages = header_of(copy / NAME)["header_size"]
    length = int.from_bytes(data[:8], "little") + 8
    first, end = {
        "header": (0, length),
        "records": (pages, pages + header_of(copy / NAME)["page"][0]["page_size"]),
        "index": (0, len(data)),
    }[what]
    dice = random.Random(5)
    outcomes = []
    for _ in range(100):
        damaged = bytearray(data)
        place = dice.randrange(first, end)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        got = outcome(copy, sound)
        assert got == "refused" or (isinstance(got, list) and len(got) <= (what == "records"))
        outcomes.append(got)
    assert "refused" in outcomes


def test_a_record_in_a_loader_names_its_own_file(copy):
    path = copy / NAME
    data = bytearray(path.read_bytes())
    data[header_of(path)["header_size"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{NAME} is damaged \(record 0: .*; copy it"):
        read(copy)


def test_links_into_a_store_of_contents(sound, tmp_path):
    """As Hugging Face's cache, DVC and Kubernetes lay files out: links of the right names."""
    folder, records = sound
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, name in enumerate((NAME, f"{NAME}.db")):
        shutil.copy(folder / name, tmp_path / "blobs" / f"{number}f1e2d")
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{number}f1e2d")
    assert read(tmp_path / "snapshot") == records
    assert read(tmp_path / "snapshot" / NAME) == records


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("b.mindrecord", ".db", "b.mindrecord has no index b.mindrecord.db beside it"),
        ("wiki", ".db", "wiki has no index wiki.db beside it"),
        ("b.mindrecord", "", "b.mindrecord: no such file"),
    ],
)
def test_half_a_pair_in_a_folder_is_missing_data(copy, name, gone, message):
    """Of an interrupted copy, whatever the file is called."""
    with RecordWriter(copy / name, tuple(COLUMNS)) as writer:
        ids = np.ones((2, LENGTH), np.int32)
        writer.write(input_ids=ids, labels=ids)
    (copy / f"{name}{gone}").unlink()
    with pytest.raises(UserError, match=message):
        read(copy)


def test_what_is_no_record_in_a_folder_is_in_nobodys_way(sound, copy):
    (copy / "README.md").write_text("about")
    (copy / "Thumbs.db").write_bytes(b"SQLite format 3\0")
    (copy / "rows.mindrecord.rows.jsonl").write_text("{}")
    (copy / ".hidden.mindrecord").write_text("")
    (copy / "older.mindrecord").mkdir()
    assert outcome(copy, sound) == []


@pytest.mark.parametrize("name", [NAME, f"{NAME}.db"])
def test_a_link_to_nothing_is_missing_data(copy, name):
    with RecordWriter(copy / "a.mindrecord", tuple(COLUMNS)) as writer:
        ids = np.ones((2, LENGTH), np.int32)
        writer.write(input_ids=ids, labels=ids)
    (copy / name).unlink()
    (copy / name).symlink_to("/nonexistent/blob")
    with pytest.raises(UserError, match=f"{name}: a symbolic link to /nonexistent/blob"):
        read(copy)
