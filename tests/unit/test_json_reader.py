"""The one JSON reader: what is no sound JSON is an error that names the file and the place."""

import pytest

from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import (
    decode_json,
    parse_json,
    read_json,
    read_json_object,
    require_shape,
)

DEEP = 200_000
NOT_JSON = {
    "nothing": (b"", "is empty"),
    "cut off": (b'{"a": [1, 2', "line 1 column 12"),
    "more behind": (b'{"a": 1} {"b": 2}', "Extra data"),
    "lists without end": (b"[" * DEEP, "nested more than 200 deep"),
    "objects without end": (b'{"a":' * DEEP, "nested more than 200 deep"),
    "deep and whole": (b"[" * 300 + b"]" * 300, "nested more than 200 deep"),
    "NaN": (b'{"rope_theta": NaN}', "rope_theta is NaN"),
    "infinity": (b'{"a": Infinity}', "a is NaN, infinite"),
    "minus infinity": (b'{"a": {"b": [-Infinity]}}', "a.b.0 is NaN, infinite"),
    "beyond float64": (b'{"a": 1e400}', "a is NaN, infinite or beyond float64"),
    "6000 digits": (b'{"a": ' + b"7" * 6000 + b"}", "more digits than can be read"),
    "a name twice": (b'{"hidden_size": 1, "b": 2, "hidden_size": 3}', "'hidden_size' twice"),
    "a name twice, deep": (b'{"a": [{"b": 1, "b": 1}]}', "'b' twice"),
    "half a character": (b'{"a": "\\ud800"}', r"lone surrogate '\ud800'"),
    "half a character as a name": (b'{"\\udc00": 1}', r"lone surrogate '\udc00'"),
    "latin1": (b'{"a": "caf\xe9"}', "byte 0xe9 at offset 10 is not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed with gzip"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_no_json_is_named(case, tmp_path):
    path = tmp_path / "config.json"
    data, expected = NOT_JSON[case]
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "text, value",
    [
        (
            '{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00"]}',
            [1, -2500.0, True, None, "é😀"],
        ),
        ('\ufeff{"a": []}', []),
        (' \n{"a": ' + "[" * 199 + "]" * 199 + "}", "deep"),
        ('{"a": ' + "9" * 40 + "}", int("9" * 40)),
    ],
)
def test_sound_json_is_read(text, value, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    found = read_json_object(path)["a"]
    assert found == value or (value == "deep" and str(found).count("[") == 199)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "list").write_text("[1]")
    for name, expected in (
        ("absent", "no such file"),
        ("", "a folder"),
        ("link", "symbolic link to nowhere"),
        ("list", "holds a list, not an object"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(UserError, match=expected):
            read_json_object(tmp_path / name)


def test_a_line_is_named_by_whoever_reads_it():
    with pytest.raises(UserError, match=r"^p\.jsonl, line 7: not JSON \(an object has 'a' twice\)"):
        parse_json('{"a": 1, "a": 2}', "p.jsonl, line 7")


def test_rows_of_data_may_hold_what_is_looked_at_later():
    row = decode_json('{"score": NaN, "far": 1e999, "text": "\\ud800"}', row=True)
    assert row["score"] != row["score"]
    assert (row["far"], row["text"]) == (float("inf"), "\ud800")
    with pytest.raises(ValueError, match="'a' twice"):
        decode_json('{"a": 1, "a": 2}', row=True)


SHAPE = {"step": int, "files": {str: {"shape": [int], "rate?": (float, None)}}}
WELL_FORMED = {"step": 3, "files": {"f": {"shape": [2, 3], "rate": 0.5}, "g": {"shape": []}}}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, None),
        ({"step": True}, "m.json: 'step': true or false, but must be a whole number"),
        ({"step": 3.0}, "m.json: 'step': a number, but must be a whole number"),
        ({"files": []}, "m.json: 'files': a list, but must be an object"),
        ({"files": {"f": {}}}, "m.json: 'files': 'f': lacks 'shape'"),
        ({"files": {"f": {"shape": [2, "3"]}}}, "'shape'[1]: a text, but must be a whole number"),
        ({"files": {"f": {"shape": [], "rate": 1}}}, None),
        ({"files": {"f": {"shape": [], "rate": None}}}, None),
        ({"files": {"f": {"shape": [], "rate": "1"}}}, "'rate': a text, but must be a number or"),
        ({"further": "keys"}, None),
    ],
)
def test_shapes(change, expected):
    value = {**WELL_FORMED, **change}
    if expected is None:
        require_shape(value, SHAPE, "m.json")
        return
    with pytest.raises(UserError) as error:
        require_shape(value, SHAPE, "m.json")
    assert expected in str(error.value)
    with pytest.raises(KeyError):
        require_shape(value, SHAPE, "m.json", KeyError)


def test_the_whole_has_a_shape_too():
    with pytest.raises(UserError, match=r"m\.json: a list, but must be an object"):
        require_shape([1], SHAPE, "m.json")
