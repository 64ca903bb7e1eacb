"""Rows out of files against the json and pyarrow packages, whatever the size of a block."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.data.readers import text_blocks as text
from mixtral_ms.data.readers.json_and_parquet import read_rows
from mixtral_ms.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def read(path):
    advanced = []
    rows = [row.value for row in read_rows(path, advanced.append)]
    assert sum(advanced) == path.stat().st_size
    return rows


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.booleans(), st.booleans())
def test_a_list_is_read_as_json_reads_it(tmp_path_factory, rows, block, ascii_only, indented):
    path = tmp_path_factory.mktemp("rows") / "a.json"
    dumped = json.dumps(rows, ensure_ascii=ascii_only, indent=2 if indented else None)
    path.write_bytes(dumped.encode("utf-8", "surrogatepass") + b"\n")
    try:
        dumped.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block)
        assert read(path) == rows


def test_lines_and_parquet(tmp_path):
    rows = [{"a": "\u4f60", "n": number} for number in range(200)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read(lines) == rows
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"a": 1}, {"a": tru}]', r"row 1 \(counted from 0\) is not JSON"),
        ('[{"a": 1} {"a": 2}]', "row 0 .*no , or ]"),
        ('[{"a": "never ends', "row 0 .*Unterminated"),
        ('[{"a": 1}', "row 0 .*no , or ]"),
        ('[{"a": 1}, ', "row 1 .*Expecting value"),
        ("[1] [2]", "more behind"),
        ('{"a": 1}\n{"a": \n', "a.json, line 2: not JSON"),
        ("[" * 100_000, "row 0 .*not JSON"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / "a.json", lambda _: None))


NOT_ROWS = {
    "a.jsonl": [
        (b'{"a": 1}\n' + b"[" * 200_000, r"a.jsonl, line 2: not JSON \(nested more than 200"),
        (b'{"a": 1}\n{"a": ' + b"1" * 6000 + b"}", "line 2: .*more digits"),
        (b'\n\n{"a": 1, "a": 2}', "line 3: not JSON .an object has 'a' twice"),
        (b"\x1f\x8b\x08\0\0", "is compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\0\x80", "is compressed with zstd"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
        ('{"a": 1}\n'.encode("utf-16-le"), "is UTF-16 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html>", "is a web page"),
        (b"PAR1\x15\x04\x15", "is a Parquet file"),
    ],
    "a.json": [
        (b'[{"a": 1}, {"id": ' + b"1" * 6000 + b"}]", "row 1 .*more digits"),
        (b'[{"a": 1}, {"b": 1, "b": 2}]', "row 1 .*'b' twice"),
        (b"[" + b'{"a":' * 300 + b"1" + b"}" * 300 + b"]", "row 0 .*nested more than 200"),
        (b"[" + b'{"a":' * 200_000, "row 0 .*nested more than 200"),
        ('[{"a": 1}]'.encode("utf-16"), "is UTF-16 text"),
    ],
    "a.parquet": [
        (b"", "is empty"),
        (b'{"a": 1}', "not a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        (b"PAR1" + b"\0" * 50 + b"PAR1", "Parquet"),
    ],
    "a.jsonl.gz": [(b"\x1f\x8b\x08\0\0", "rows are read from .*compressed with gzip: .*gunzip")],
}


@pytest.mark.parametrize(
    "name, content, message",
    [(name, *case) for name, cases in NOT_ROWS.items() for case in cases],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_rows_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(tmp_path / name, lambda _: None))
    assert str(tmp_path / name) in str(error.value)


def test_a_row_may_hold_what_its_reader_does_not_use(tmp_path):
    for name, row in (("a.jsonl", '{"a": NaN, "b": "\\ud800"}'), ("a.json", '[{"a": Infinity}]')):
        (tmp_path / name).write_text(row)
        ((number, place, value),) = read_rows(tmp_path / name, lambda _: None)
        assert number == 0 and place in ("line 1", "row 0 (counted from 0)") and "a" in value


def test_damage_within_parquet_is_located(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {n} " + "x" * (n % 7)} for n in range(300)]
    table = pa.Table.from_pylist(rows)
    options = {"row_group_size": 100, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, path, write_page_checksum=True, **options)
    whole = path.read_bytes()
    assert read(path) == rows
    at = whole.index(b"row 150 ")
    path.write_bytes(whole[:at] + b"\xaa" * 60 + whole[at + 60 :])
    with pytest.raises(UserError, match=r"a\.parquet, row group 1: damaged"):
        read(path)
    for at in range(0, len(whole), max(1, len(whole) // 60)):  # whatever is changed: rows or error
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            assert len(read(path)) == len(rows)
        except UserError as error:
            assert str(path) in str(error)
    bad = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(UserError, match=r"rows 0 to 1 .*not UTF-8 \(byte 0xff\)"):
        read(path)


def test_bytes_that_are_no_text_or_no_parquet_are_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UserError, match="0xff at offset 8"):
        list(read_rows(tmp_path / "a.json", lambda _: None))
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(read_rows(tmp_path / "a.parquet", lambda _: None))
    with pytest.raises(UserError, match=r"rows are read from \.json"):
        list(read_rows(tmp_path / "a.csv", lambda _: None))


@pytest.mark.parametrize("number", ["10.0", "1e+5", "1.5E-3", "12"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_a_number_is_read_whole_wherever_a_block_ends(tmp_path, monkeypatch, number, block):
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    path = tmp_path / "a.json"
    path.write_text(f"[{number},{number} ,[{number}]]")
    assert read(path) == [float(number), float(number), [float(number)]]
