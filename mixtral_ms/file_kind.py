"""What is this file? One identification that every reader asks before it calls a file damaged."""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mixtral_ms.errors import UserError

_START = 4096
_PAGES = {".html", ".htm", ".xhtml", ".xml"}


class FileKind(NamedTuple):
    """What a file is instead of what was wanted, and what to do about it."""

    name: str
    advice: str


def require_file(path: str | os.PathLike[str], flag: str = "") -> None:
    """Raise UserError, saying what is there instead, unless `path` is an ordinary file.

    Called before opening: a FIFO or a device would be waited for without end. The `flag` is the one
    that it was given with.
    """
    if (obstacle := _not_a_file(Path(path))) is not None:
        raise UserError(f"{flag} {path}: {obstacle}".lstrip())


def _not_a_file(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"a symbolic link to {os.readlink(path)}, which does not exist"
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:
        return "no such file: a name cannot hold the character NUL"
    if stat.S_ISREG(mode):
        return None
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe (FIFO)"),
        (stat.S_ISSOCK, "a socket"),
        (lambda _: True, "a device"),
    )
    return f"{next(name for test, name in kinds if test(mode))}, not a file"


def kind_of(path: str | os.PathLike[str]) -> FileKind | None:
    """What the beginning of an ordinary file gives away; None where it gives nothing away.

    For the message of a reader that cannot use a file, not for choosing a reader.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except OSError:
        return None
    found = next((kind for test, kind in _KINDS if test(start)), None)
    if found is _LFS and (size := _LFS_SIZE.search(start)):
        return _LFS._replace(name=f"{_LFS.name} (to {int(size[1]):,} bytes)")
    return found


def not_as_wanted(path: str | os.PathLike[str], wanted: str, why: str) -> UserError:
    """The error of a reader that cannot use a file: what the file is, or else `why` not.

    Args:
        path: the file.
        wanted: what the reader reads, with its article: "JSON", "a Parquet file".
        why: what the reader stumbled over, where the file does not say what it is.
    """
    kind = kind_of(path)
    if kind is None:
        return UserError(f"{path}: not {wanted} ({why})")
    return UserError(f"{path} is {kind.name}, not {wanted}; {kind.advice}")


def not_utf8(path: str | os.PathLike[str], offset: int, error: UnicodeDecodeError) -> UserError:
    """The error for bytes that are no UTF-8, with what the file is, or with the offset."""
    if (kind := kind_of(path)) is not None:
        return UserError(f"{path} is {kind.name}, not UTF-8 text; {kind.advice}")
    byte = error.object[error.start]
    return UserError(
        f"{path}: byte 0x{byte:02x} at offset {offset} is not UTF-8 ({error.reason}); "
        "convert the file, for example with: iconv -f latin1 -t utf-8"
    )


def require_text(path: str | os.PathLike[str]) -> str | None:
    """What is doubtful of a file to be read as text; None where nothing is.

    Raises UserError for what UTF-8 would let pass and is no text: a pointer, an archive, UTF-16.
    """
    kind = kind_of(path)
    if kind is None:
        return None
    with open(path, "rb") as file:
        start = file.read(_START)
    if "pointer" in kind.name or b"\0" in start:
        raise UserError(f"{path} is {kind.name}, not UTF-8 text; {kind.advice}")
    if not start:
        return f"{path} is empty"
    if _is_page(start) and Path(path).suffix.lower() not in _PAGES:
        return f"{path} begins as a web page and is read as plain text: is it what was wanted?"
    return None


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.startswith(starts)


def _is_page(start: bytes) -> bool:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!-- "))


def _is_utf16(start: bytes) -> bool:
    """With its mark, or western text without: every other byte is zero."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    start = start[: len(start) & ~1]
    halves = start[::2], start[1::2]
    return len(start) >= 8 and any(
        not any(zeros) and all(others) for zeros, others in (halves, halves[::-1])
    )


def _has_header(*words: bytes) -> Callable[[bytes], bool]:
    """A length of 8 bytes, then a JSON header that has one of the words near its beginning."""
    return lambda start: start[8:9] == b"{" and any(word in start for word in words)


def _unpack(name: str, command: str) -> FileKind:
    return FileKind(f"compressed with {name}", f"unpack it first: {command}")


_UTF16 = "convert it: iconv -f {0} -t utf-8"
_WEIGHTS = "weights are given by --load_checkpoint or --input_path"
MINDRECORD = FileKind("a MindRecord", "it is read by training: --train_data")
"""What a MindRecord's data file is to other readers."""
ZIP_KIND = FileKind(
    "a zip archive (or a PyTorch file)", f"unzip it if it holds the data; {_WEIGHTS}"
)
SAFETENSORS_KIND = FileKind("a safetensors file", _WEIGHTS)
PICKLE_KIND = FileKind("a Python pickle", _WEIGHTS)
_LFS = FileKind("a git-lfs pointer", "fetch the file itself: git lfs pull")
_LFS_SIZE = re.compile(rb"^size (\d{1,18})\s*$", re.MULTILINE)
_KINDS: tuple[tuple[Callable[[bytes], bool], FileKind], ...] = (
    (
        lambda start: not start,
        FileKind("empty (0 bytes)", "was it written, or downloaded, to the end?"),
    ),
    (
        lambda start: not any(start),
        FileKind("nothing but zeros at its beginning", "it is not whole; get it anew"),
    ),
    (
        _begins(b"version https://git-lfs.github.com/spec/"),
        _LFS,
    ),
    (
        _begins(b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/"),
        FileKind("a git-annex pointer", "fetch the file itself: git annex get"),
    ),
    (
        _is_page,
        FileKind(
            "a web page (HTML or XML)",
            "the download got a page instead of the file: look into it, and download the file",
        ),
    ),
    (_begins(b"\x1f\x8b"), _unpack("gzip", "gunzip")),
    (_begins(b"\x28\xb5\x2f\xfd"), _unpack("zstd", "zstd -d")),
    (_begins(b"BZh"), _unpack("bzip2", "bunzip2")),
    (_begins(b"\xfd7zXZ\0"), _unpack("xz", "unxz")),
    (_begins(b"\x04\x22\x4d\x18"), _unpack("lz4", "lz4 -d")),
    (_begins(b"7z\xbc\xaf\x27\x1c"), _unpack("7-Zip", "7z x")),
    (
        _begins(b"PK\x03\x04", b"PK\x05\x06"),
        ZIP_KIND,
    ),
    (
        lambda start: start[257:262] == b"ustar",
        FileKind("a tar archive", "unpack it first: tar -xf"),
    ),
    (
        _begins(b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
        FileKind("UTF-32 text", _UTF16.format("utf-32")),
    ),
    (_is_utf16, FileKind("UTF-16 text", _UTF16.format("utf-16"))),
    (
        _begins(b"PAR1"),
        FileKind("a Parquet file", "give it a name that ends in .parquet, where rows are read"),
    ),
    (
        _begins(b"ARROW1", b"\xff\xff\xff\xff"),
        FileKind("an Arrow file", "write it as .parquet or .jsonl"),
    ),
    (
        _begins(b"MMIDIDX\0\0"),
        FileKind("a Megatron .idx index", "it belongs to a .bin of token ids"),
    ),
    (_begins(b"SQLite format 3\0"), FileKind("an SQLite database", "give the data file instead")),
    (_begins(b"\x93NUMPY"), FileKind("a NumPy array", "write its contents in the format wanted")),
    (_begins(b"\x89HDF\r\n"), FileKind("an HDF5 file", "write its contents in the format wanted")),
    (_begins(b"GGUF"), FileKind("a GGUF file", "take the original weights, in safetensors")),
    (_begins(b"%PDF-"), FileKind("a PDF", "extract its text first")),
    (
        _has_header(b'"shard_addresses"', b'"index_fields"', b'"blob_fields"'),
        MINDRECORD,
    ),
    (
        _has_header(b'"data_offsets"', b'"__metadata__"'),
        SAFETENSORS_KIND,
    ),
    (
        lambda start: start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"),
        PICKLE_KIND,
    ),
)
