"""Rows out of JSON, JSON Lines and Parquet files, a few in memory at a time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_ms.data.readers.text_blocks import Advance, read_text_blocks
from mixtral_ms.errors import MissingDependencyError, UserError
from mixtral_ms.file_kind import not_utf8

JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
PARQUET_SUFFIXES = {".parquet", ".pq"}
_PARQUET_ROWS = 64
_MAX_ROW = 1 << 28
_GROWING_NUMBER = re.compile(r"(?:\.|[eE][+-]?)?")  # behind 1 it may become 12, 1.5 or 1e+5
_SPACE = re.compile(r"[ \t\n\r]+")
# What a cut-off row can look like to the decoder besides an unterminated string: an error this near
# to the end (the longest token is a \uXXXX escape behind another).
_CUT_OFF = 14


def read_rows(path: Path, advance: Advance) -> Iterator[Any]:
    """The rows of one file: a JSON list, one JSON value a line, or a Parquet table.

    Args:
        path: its suffix tells Parquet from JSON, its first character a list from lines.
        advance: told of the bytes as they are read.

    Raises UserError, with the row or the line, for what is no JSON or no Parquet.
    """
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return _parquet_rows(path, advance)
    if suffix not in JSON_SUFFIXES:
        known = ", ".join(sorted(JSON_SUFFIXES | PARQUET_SUFFIXES))
        raise UserError(f"{path}: rows are read from {known} files")
    if _begins_list(path):
        return _list_rows(path, advance)
    return _line_rows(path, advance)


def _begins_list(path: Path) -> bool:
    with open(path, "rb") as file:
        while block := file.read(1 << 12):
            text = block.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
            if text:
                return text.startswith(b"[")
    return False


def _line_rows(path: Path, advance: Advance) -> Iterator[Any]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _line_row(path, number, line, offset)
            offset += len(line)
            advance(len(line))


def _line_row(path: Path, number: int, line: bytes, offset: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: not JSON ({error}); give one JSON value a line, or one list"
        ) from error


def _list_rows(path: Path, advance: Advance) -> Iterator[Any]:
    """Items of a JSON list, decoded one by one out of a growing and shrinking buffer."""
    buffer = _Buffer(path, advance)
    buffer.skip("[")
    if buffer.peek() != "]":
        row = 0
        yield buffer.decode(row)
        while buffer.peek() == ",":
            buffer.skip(",")
            row += 1
            yield buffer.decode(row)
        if buffer.peek() != "]":
            raise buffer.damaged(row, "no , or ] behind it")
    buffer.skip("]")
    if buffer.peek():
        raise UserError(f"{path}: there is more behind the ] that ends its list")


class _Buffer:
    """The part of a file's text that is being decoded."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._path = path
        self._blocks = read_text_blocks(path, advance)
        self._text, self._at, self._whole = "", 0, False
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            if space := _SPACE.match(self._text, self._at):
                self._at = space.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, expected: str) -> None:
        """Step over the character that `peek` has just shown."""
        self.peek()
        self._at += len(expected)

    def decode(self, row: int) -> Any:
        """The next value. Raises UserError for what is none."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._may_be_cut_off(error) or not self._more():
                    raise self.damaged(row, str(error)) from error
                continue
            if not _GROWING_NUMBER.fullmatch(self._text, end) or not self._more():
                self._at = end
                return value

    def damaged(self, row: int, why: str) -> UserError:
        """The error for a row that cannot be decoded."""
        return UserError(f"{self._path}: row {row} (counted from 0) is not JSON: {why}")

    def _may_be_cut_off(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError) or len(self._text) - self._at > _MAX_ROW:
            return False
        near_the_end = error.pos >= len(self._text) - _CUT_OFF
        return near_the_end or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Drop what has been decoded and read on, twice as much when a row is long."""
        self._text = self._text[self._at :]
        self._at = 0
        wanted = 2 * len(self._text) + 1
        parts = [self._text]
        while not self._whole and sum(map(len, parts)) < wanted:
            block = next(self._blocks, None)
            self._whole = block is None
            parts.append(block or "")
        grown = len(parts) > 1 and any(parts[1:])
        self._text = "".join(parts)
        return grown


def _parquet_rows(path: Path, advance: Advance) -> Iterator[Any]:
    """Rows of a Parquet file; its bytes are reported in proportion to the rows read."""
    file = open_parquet(path)
    size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
    rows = reported = 0
    with file:
        for batch in file.iter_batches(_PARQUET_ROWS, use_threads=False):
            yield from batch.to_pylist()
            rows += batch.num_rows
            advance(size * rows // total - reported)
            reported = size * rows // total


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError without pyarrow, or for a file that is no Parquet."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to import
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", "parquet", "reading Parquet files") from error
    except ImportError as error:
        raise UserError(f"reading Parquet files: pyarrow does not work here ({error})") from error
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
