import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_ms.data.documents import wikitext as wiki_module
from mixtral_ms.data.documents.json_documents import read_wikipedia
from mixtral_ms.data.documents.token_packer import TokenPacker
from mixtral_ms.data.documents.wikitext import clean_wikitext, read_wiki
from mixtral_ms.data.readers import text_blocks as text_module
from mixtral_ms.data.readers.row_log import RowLog
from mixtral_ms.data.readers.text_blocks import read_text_blocks
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

WIKITEXT = """ \n = Robert Boulter = \n \n Robert Boulter is an English film , television and \
theatre actor . He had a guest @-@ starring role in 2000 ; it cost 1 @,@ 000 ( or " 2 @.@ 5 " ) \
. \n His second paragraph 's words , <unk> . \n \n = = Career = = \n \n = = = 2000 – 2005 = = = \n \
 \n In 2000 he played " Scott Parry " [ sic ] . \n"""


def documents(path, **options):
    options = {"clean": True, "split_long": True, **options}
    return list(read_wiki(path, lambda count: None, **options))


def joined(pieces):
    """Whole documents from pieces, checking that starts and ends alternate."""
    whole, parts = [], []
    for text, starts, ends in pieces:
        assert starts == (not parts)
        parts.append(text)
        if ends:
            whole.append(" ".join(parts))
            parts = []
    assert not parts
    return whole


def test_wikitext_documents_are_cleaned_section_bodies_without_headings(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKITEXT, encoding="utf-8")
    assert [one.text for one in documents(path)] == [
        "Robert Boulter is an English film, television and theatre actor. He had a guest-starring "
        'role in 2000; it cost 1,000 (or "2.5").\nHis second paragraph\'s words, <unk>.',
        'In 2000 he played "Scott Parry" [sic].',
    ]


def test_text_that_is_not_to_be_cleaned_stays(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_bytes(b"\xef\xbb\xbf= A =\r\n  x , y\r\n\r\n\r\n  \r\nsecond\r\n")
    assert [one.text for one in documents(path, clean=False)] == ["= A =\n  x , y", "second"]
    assert [one.text for one in documents(path)] == ["x, y", "second"]


def test_a_paragraph_that_only_begins_like_a_heading_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("= 1 + 2\n\n=\n\n = Title = \n\n")
    assert [one.text for one in documents(path)] == ["= 1 + 2", "="]


@pytest.mark.parametrize("pair", ["()", "[]", "{}", '""', "''"])
def test_white_space_inside_pairs_goes_as_a_regular_expression_would_do_it(pair):
    opening, closing = map(re.escape, pair)
    pattern = re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}")
    draw = random.Random(pair)
    for _ in range(2000):
        text = "".join(draw.choice(f"{pair}ab \n") for _ in range(draw.randrange(14)))
        expected = pattern.sub(lambda found: pair[0] + found[1] + pair[1], text)
        assert wiki_module._strip_inside(text, *pair) == expected


def test_unmatched_brackets_take_linear_time():
    assert clean_wikitext("(" * 300_000) == "(" * 300_000


@settings(max_examples=60, deadline=None)
@given(st.text("ab =\n\u00e9\U0001f600'\"", max_size=200), st.integers(1, 9))
def test_block_size_and_long_limit_do_not_change_documents(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_text(text, encoding="utf-8")
    expected = [one.text for one in documents(path, clean=False, split_long=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "BLOCK_BYTES", block)
        patch.setattr(wiki_module, "LONG_TEXT", 5)
        assert joined(documents(path, clean=False)) == expected
        joined(documents(path))


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one two three four\n\nfive")
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 8)
    monkeypatch.setattr(wiki_module, "LONG_TEXT", 3)
    pieces = documents(path)
    assert [tuple(one) for one in pieces[:2]] == [("one", True, False), ("two", False, False)]
    assert joined(pieces) == ["one two three four", "five"]


def test_text_without_blank_lines_and_spaces_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(wiki_module, "_MAX_PARAGRAPH", 500)
    with pytest.raises(UserError, match="longer than 500"):
        documents(path)


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_located(tmp_path, monkeypatch, block, bom):
    path = tmp_path / "latin.txt"
    path.write_bytes(bom + "né".encode() + b"caf\xe9 au lait")
    monkeypatch.setattr(text_module, "BLOCK_BYTES", max(block, 3))
    with pytest.raises(UserError, match=rf"latin.txt: byte 0xe9 at offset {len(bom) + 6} "):
        list(read_text_blocks(path, lambda count: None))


def test_progress_adds_up_to_the_file_size(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("héllo\n\n" * 100)
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 64)
    counts = []
    list(read_wiki(path, counts.append, clean=True, split_long=True))
    assert sum(counts) == path.stat().st_size


NOT_TEXT = {
    "gzip": (b"\x1f\x8b\x08\0", "is compressed with gzip, not UTF-8 text"),
    "zstd": (b"\x28\xb5\x2f\xfd\0", "is compressed with zstd, not UTF-8 text"),
    "UTF-16": ("text".encode("utf-16"), "is UTF-16 text, not UTF-8 text"),
    "UTF-16 without a mark": ("plain text".encode("utf-16-le"), "is UTF-16 text, not UTF-8 text"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zeros": (b"\0" * 100, "nothing but zeros"),
    "Parquet": (b"PAR1\x15\0\x15", "is a Parquet file, not UTF-8 text"),
    "latin1": (b"caf\xe9", "byte 0xe9 at offset 3"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_what_is_no_text_is_named(case, tmp_path):
    path = tmp_path / "a.txt"
    data, expected = NOT_TEXT[case]
    path.write_bytes(data)
    with pytest.raises(UserError, match=expected):
        documents(path)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "<!DOCTYPE html><p>404</p>", "begins as a web page"),
        ("a.html", "<!DOCTYPE html><p>wanted</p>", ""),
        ("a.txt", "GGUF is a format, as PAR1 is", ""),
    ],
)
def test_doubtful_text_is_said(tmp_path, caplog, monkeypatch, name, content, expected):
    monkeypatch.setattr(get_logger(), "propagate", True)
    (tmp_path / name).write_text(content)
    documents(tmp_path / name)
    assert expected in caplog.text and bool(expected) == bool(caplog.text)


def rows(path, column="text", log=None):
    counts = []
    options = {"text_column": column, "split_long": True, "log": log or RowLog()}
    pieces = read_wikipedia(path, counts.append, **options)
    whole = joined(pieces)
    assert sum(counts) == path.stat().st_size
    return whole


TEXTS = ["first <unk>", "", "zweite Zeile\n\nmit Absatz", "日本"]


def test_jsonl_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": 1, "text": one}) for one in TEXTS) + "\n\n")
    assert rows(path) == [one for one in TEXTS if one]


def test_parquet_rows(tmp_path):
    pa = pytest.importorskip("pyarrow", exc_type=ImportError)
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [*TEXTS, None] * 50}), path)
    assert rows(path, "body") == [one for one in TEXTS if one] * 50
    with pytest.raises(UserError, match=r"no column 'text'; it has 'body'"):
        rows(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="is int64"):
        rows(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        rows(path)


EMPTY = {"": "empty", None: "null", "   ": "white space", "\n\t\u3000": "white space"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_each_row_is_a_document_or_named(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow", exc_type=ImportError)
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    texts = ["one", *EMPTY, "two"]
    path = tmp_path / f"a{suffix}"
    items = [{"text": one} for one in texts]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text(
            json.dumps(items) if suffix == ".json" else "\n".join(map(json.dumps, items))
        )
    log = RowLog()
    assert rows(path, log=log) == ["one", "two"]
    assert (log.read, log.taken, log.named) == (6, 2, {"left out": 4})
    for number, reason in enumerate(EMPTY.values(), start=1):
        assert log.first[number - 1].startswith(f"row {number} of a{suffix}: left out: its 'text'")
        assert reason in log.first[number - 1]
    assert "most rows were LEFT OUT" in log.report()


def test_columns_of_text_in_parquets_other_types(tmp_path):
    pa = pytest.importorskip("pyarrow", exc_type=ImportError)
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    path = tmp_path / "a.parquet"
    texts = pa.array(["a", "b", "a"])
    for column in (texts, texts.dictionary_encode(), texts.cast("large_string"), pa.array([None])):
        pq.write_table(pa.table({"text": column}), path)
        assert rows(path) == [one for one in column.to_pylist() if one]
    for column in (pa.array([["a"]]), pa.array([b"a"]), pa.array([1]).dictionary_encode()):
        pq.write_table(pa.table({"text": column}), path)
        with pytest.raises(UserError, match="column 'text' is .*, not text"):
            rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2: not JSON"),
        (b'{"text": ' + b"[" * 100_000, "line 2: not JSON (nested more than 200 deep)"),
        (b'{"text": "a", "text": "b"}', "line 2: not JSON (an object has 'text' twice)"),
        (b'{"text": NaN}', "line 2: 'text' is a float"),
        (b"[1]", "line 2: a list"),
        (b'{"body": "a"}', "line 2: no 'text'; it has 'body'"),
        (b'{"text": 3}', "line 2: 'text' is a int"),
        (b'{"text": "\\ud800"}', "line 2: 'text' holds a lone surrogate"),
        (b'{"text": "\xff"}', "byte 0xff at offset 24"),
    ],
)
def test_bad_json_rows_are_located(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + line)
    with pytest.raises(UserError, match=re.escape(message)):
        rows(path)


def test_unknown_suffix_is_refused():
    with pytest.raises(UserError, match="--dataset_type wiki"):
        rows(Path("a.csv"))


@given(
    st.lists(st.lists(st.integers(0, 31999), max_size=9), max_size=30),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_packing_keeps_the_stream(documents, record_length, every):
    packer = TokenPacker(record_length)
    taken = []
    for number, ids in enumerate(documents):
        packer.add(np.array(ids, np.int32))
        if number % every == 0:
            taken.append(packer.take(limit=number))
    taken.append(packer.take())
    stream = sum(documents, [])
    got = np.concatenate([one.reshape(-1) for one in taken])
    assert got.tolist() == stream[: len(stream) // record_length * record_length]
    assert all(one.dtype == np.int32 and one.shape[1] == record_length for one in taken)
    assert packer.pending == len(stream) % record_length
    assert packer.tokens == len(stream)
