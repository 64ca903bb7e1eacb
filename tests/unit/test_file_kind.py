"""What is this file? Told from its beginning, and from what is there instead of a file."""

import os
import socket

import pytest

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import kind_of, not_as_wanted, require_file

KINDS = {
    "empty": (b"", "empty (0 bytes)"),
    "zeros": (b"\0" * 5000, "nothing but zeros"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git-lfs"),
    "git-annex": (b"/annex/objects/SHA256E-s3--ab", "git-annex"),
    "page": (b"\xef\xbb\xbf\n <!DOCTYPE HTML><title>404</title>", "web page"),
    "bare page": (b"<html lang=en>", "web page"),
    "page of a store": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "web page"),
    "gzip": (b"\x1f\x8b\x08\0\0\0", "gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd\0", "zstd"),
    "bzip2": (b"BZh91AY", "bzip2"),
    "xz": (b"\xfd7zXZ\0\0", "xz"),
    "lz4": (b"\x04\x22\x4d\x18", "lz4"),
    "zip": (b"PK\x03\x04\x14\0", "zip archive"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
    "UTF-16": ("text".encode("utf-16"), "UTF-16"),
    "UTF-16, big": ("more text".encode("utf-16-be"), "UTF-16"),
    "UTF-32": ("text".encode("utf-32"), "UTF-32"),
    "Parquet": (b"PAR1\x15\x04", "Parquet"),
    "Arrow": (b"ARROW1\0\0", "Arrow"),
    "Megatron": (b"MMIDIDX\0\0\1\0", "Megatron"),
    "SQLite": (b"SQLite format 3\0", "SQLite"),
    "GGUF": (b"GGUF\3\0", "GGUF"),
    "safetensors": (
        (60).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "safetensors",
    ),
    "MindRecord": ((99).to_bytes(8, "little") + b'{"blob_fields":{},"compression":{', "MindRecord"),
    "pickle": (b"\x80\x02}q\0.", "pickle"),
    "text": (b"Once upon a time", None),
    "JSON": (b'{"a": 1}', None),
    "one byte": (b"a", None),
    "latin1": (b"caf\xe9 and more", None),
    "Chinese": ("你好世界，你好。".encode(), None),
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds(case, tmp_path):
    path = tmp_path / "file"
    data, expected = KINDS[case]
    path.write_bytes(data)
    kind = kind_of(path)
    if expected is None:
        assert kind is None
        assert "file: not JSON (because)" in str(not_as_wanted(path, "JSON", "because"))
        return
    assert expected in kind.name
    message = str(not_as_wanted(path, "JSON", "because"))
    assert message == f"{path} is {kind.name}, not JSON; {kind.advice}"


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good").write_text("a")
    (tmp_path / "link to good").symlink_to("good")
    with socket.socket(socket.AF_UNIX) as one:
        monkeypatch.chdir(tmp_path)
        one.bind("socket")
    for name, expected in (
        ("fifo", "a named pipe (FIFO), not a file"),
        ("socket", "a socket, not a file"),
        ("", "a folder, not a file"),
        ("link", "a symbolic link to nowhere, which does not exist"),
        ("loop", "Too many levels of symbolic links"),
        ("absent", "no such file"),
        ("a\0b", "NUL"),
        ("n" * 300, "File name too long"),
        ("/dev/null", "a device, not a file"),
    ):
        with pytest.raises(UserError) as error:
            require_file(tmp_path / name)
        assert expected in str(error.value)
    require_file(tmp_path / "good")
    require_file(tmp_path / "link to good")
