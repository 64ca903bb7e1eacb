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
    rows = list(read_rows(path, advanced.append))
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
