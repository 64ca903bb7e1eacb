"""Rows out of JSON and JSON Lines files, a few in memory at a time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_ms.data.readers.text_blocks import Advance, read_text_blocks
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import kind_of, not_as_wanted, not_utf8
from mixtral_ms.json_reader import ROW_DECODER, check_depth, decode_json, why_no_json

_MAX_ROW = 1 << 28
_GROWING_NUMBER = re.compile(r"(?:\.|[eE][+-]?)?")  # behind 1 it may become 12, 1.5 or 1e+5
_SPACE = re.compile(r"[ \t\n\r]+")
# What a cut-off row can look like to the decoder besides an unterminated string: an error this near
# to the end (the longest token is a \uXXXX escape behind another).
_CUT_OFF = 14


class Row(NamedTuple):
    """A row of a file: which one, counted from 0, where a user finds it, and what it holds."""

    number: int
    place: str
    value: Any


def json_rows(path: Path, advance: Advance) -> Iterator[Row]:
    """The rows of a file with a JSON list, or with one JSON value a line.

    Raises UserError, with the line or the row, for what is no JSON.
    """
    return _list_rows(path, advance) if _begins_list(path) else _line_rows(path, advance)


def _begins_list(path: Path) -> bool:
    with open(path, "rb") as file:
        while block := file.read(1 << 12):
            text = block.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
            if text:
                return text.startswith(b"[")
    return False


def _line_rows(path: Path, advance: Advance) -> Iterator[Row]:
    offset = line_number = number = 0
    with open(path, "rb") as file:
        while line := file.readline(_MAX_ROW + 1):
            line_number += 1
            place = f"line {line_number}"
            if len(line) > _MAX_ROW:
                raise UserError(f"{path}, {place}: longer than {_MAX_ROW} bytes; break it up")
            if line.strip():
                yield Row(number, place, _line_value(path, place, line, offset))
                number += 1
            offset += len(line)
            advance(len(line))


def _line_value(path: Path, place: str, line: bytes, offset: int) -> Any:
    try:
        text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, error) from error
    try:
        return decode_json(text, row=True)
    except ValueError as error:
        if offset == 0 and kind_of(path) is not None:
            raise not_as_wanted(path, "rows of JSON", str(error)) from error
        raise UserError(
            f"{path}, {place}: not JSON ({error}); give one JSON value a line, or one list"
        ) from error


def _list_rows(path: Path, advance: Advance) -> Iterator[Row]:
    """Items of a JSON list, decoded one by one out of a growing and shrinking buffer."""
    buffer = _Buffer(path, advance)
    buffer.skip("[")
    if buffer.peek() != "]":
        row = 0
        yield Row(row, counted(row), buffer.decode(row))
        while buffer.peek() == ",":
            buffer.skip(",")
            row += 1
            yield Row(row, counted(row), buffer.decode(row))
        if buffer.peek() != "]":
            raise buffer.damaged(row, "no , or ] behind it")
    buffer.skip("]")
    if buffer.peek():
        raise UserError(f"{path}: there is more behind the ] that ends its list")


def counted(row: int) -> str:
    """Where a row is that stands in no line of its own."""
    return f"row {row} (counted from 0)"


class _Buffer:
    """The part of a file's text that is being decoded."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._path = path
        self._blocks = read_text_blocks(path, advance)
        self._text, self._at, self._whole = "", 0, False
        self._scan = ROW_DECODER.raw_decode

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
            except (ValueError, RecursionError) as error:
                if not self._may_be_cut_off(error) or not self._more():
                    raise self.damaged(row, why_no_json(error)) from error
                continue
            if not _GROWING_NUMBER.fullmatch(self._text, end) or not self._more():
                break
        try:
            check_depth(self._text[self._at : end], value)
        except ValueError as error:
            raise self.damaged(row, str(error)) from error
        self._at = end
        return value

    def damaged(self, row: int, why: str) -> UserError:
        """The error for a row that cannot be decoded."""
        return UserError(f"{self._path}: {counted(row)} is not JSON: {why}")

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
