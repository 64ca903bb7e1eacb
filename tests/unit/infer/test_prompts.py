"""Prompts: which words are files, what a file is, and what is left of a prompt."""

import os
import sys

import pytest

from mixtral_ms.errors import UserError
from mixtral_ms.infer.text.prompts import read_prompts

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", BOM + b"The cat\nThe cat\n", ["The cat", "The cat"]),
        ("a.jsonl", BOM + b'{"prompt": "The cat"}\n', ["The cat"]),
        ("a.txt", b"x\r\n\r\n y \n", ["x", " y "]),
        ("a.txt", "\ufffdx\n\ufeffy".encode(), ["\ufffdx", "\ufeffy"]),
        ("a.JSONL", b'{"prompt": "\\ud83d"}\n{"prompt": "b"}', ["\ud83d", "b"]),
        ("a.jsonl", b'{"prompt": "a", "n": NaN}', ["a"]),
        ("noted", b"one\ntwo", ["one", "two"]),
        ("with space.txt", b"one", ["one"]),
    ],
)
def test_files_of_prompts(folder, name, content, prompts):
    (folder / name).write_bytes(content)
    assert read_prompts(name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "a.jsonl:2: is not JSON: nested"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "a.jsonl:1: is not JSON: .*twice"),
        ("a.jsonl", b'{"prompt": ["a"]}', 'a.jsonl:1: must be an object with a text "prompt"'),
        ("a.jsonl", b'{"prompt": ""}', "a.jsonl:1: must be"),
        ("a.jsonl", b'{"prompt": "a"} x', "a.jsonl:1: is not JSON"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "a.jsonl:1: is not JSON: a number"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\xff\xfeh\0i\0", "a.txt is UTF-16"),
        ("a.txt", b"\x1f\x8b\x08\0abc", "a.txt is compressed with gzip"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid x\nsize 3\n", "git-lfs"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a.jsonl is a web page"),
        ("a.txt", b"caf\xe9", "a.txt: byte 0xe9 at offset 3 is not UTF-8"),
        ("a.parquet", b"PAR1abc", "a.parquet is a Parquet file"),
        ("a.json", b'["a"]', "a.json has another format: give prompts as text, one a line"),
        ("a.csv", b"prompt\na", "a.csv has another format"),
    ],
)
def test_files_that_are_none(folder, name, content, part):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--predict_data: .*{part}"):
        read_prompts(["hello", name])


def make_folder(path):
    path.mkdir()


def make_link(path):
    path.symlink_to("nowhere")


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (make_folder, "prompts is a folder: name its files"),
        (make_link, "prompts is a link to what does not exist"),
        (make_device, "prompts is a device or socket"),
    ],
)
def test_what_is_there_and_is_no_file_is_no_text(folder, make, part):
    make(folder / "prompts")
    with pytest.raises(UserError, match=part):
        read_prompts("prompts")


def test_a_pipe_is_read(folder):
    reading, writing = os.pipe()
    os.write(writing, BOM + b"one\ntwo\n")
    os.close(writing)
    assert read_prompts(f"/dev/fd/{reading}") == ["one", "two"]
    os.close(reading)


@pytest.mark.parametrize("name", ["gone.txt", "x/gone.jsonl", "gone.json", "GONE.TXT", "a.parquet"])
def test_an_absent_file_is_no_text(name):
    with pytest.raises(UserError, match=f"file does not exist: {name}"):
        read_prompts(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("my prompts.txt", True),
        ("Summarise notes.jsonl", True),
        ("hello", False),
        ("x" * 5000, False),
        ("nul \0", False),
        ("half \ud83d", False),
        ("What is 1.5", False),
    ],
)
def test_a_text_that_reads_like_a_file_is_said(capsys, text, said):
    assert read_prompts(text) == [text]
    expected = f"--predict_data {text!r} is a prompt's text: there is no such file\n"
    assert (expected in capsys.readouterr().err) == said


def test_standard_input_without_its_mark(monkeypatch, folder):
    (folder / "in").write_bytes(BOM + b"one\ntwo")
    with open(folder / "in", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompts("-") == ["one", "two"]
