"""Documents of JSON and Parquet files: one row, one document, text in a named column."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_ms.data.readers.json_and_parquet import JSON_SUFFIXES, PARQUET_SUFFIXES, read_rows
from mixtral_ms.data.readers.row_log import RowLog, UnfitRowError, listed_keys
from mixtral_ms.data.readers.text_blocks import LONG_TEXT, Advance, DocumentPart
from mixtral_ms.data.tokenizer.tokenizer import split_at_spaces
from mixtral_ms.errors import UserError


def read_wikipedia(
    path: Path, advance: Advance, *, text_column: str, split_long: bool, log: RowLog
) -> Iterator[DocumentPart]:
    """Documents of one file of rows, a few of them in memory at a time.

    Rows without text are left out and named in the log. Raises UserError, with the line or the row,
    for a row that is no JSON object, has no `text_column`, or holds something else than text there.
    """
    if path.suffix.lower() not in JSON_SUFFIXES | PARQUET_SUFFIXES:
        raise UserError(
            f"{path}: dataset type wikipedia reads {', '.join(sorted(PARQUET_SUFFIXES))} and "
            f"{', '.join(sorted(JSON_SUFFIXES))} files; for plain text use --dataset_type wiki"
        )
    for row in read_rows(path, advance, text_column):
        log.read += 1
        try:
            text = _text_of(row.value, text_column, f"{path}, {row.place}")
        except UnfitRowError as error:
            log.add(path, row.number, "left out", str(error))
            continue
        yield from _parts(split_at_spaces(text, LONG_TEXT) if split_long else iter((text,)))


def _parts(parts: Iterator[str]) -> Iterator[DocumentPart]:
    """Parts of one document, the first and the last marked."""
    held = next(parts)
    starts = True
    for part in parts:
        yield DocumentPart(held, starts, False)
        held, starts = part, False
    yield DocumentPart(held, starts, True)


def _text_of(row: Any, column: str, where: str) -> str:
    """A row's text. Raises UnfitRowError for a row without one."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, but each row must be one JSON object")
    if column not in row:
        raise UserError(
            f"{where}: no {column!r}; it has {listed_keys(row)}: "
            "name the one with the text by --text_column"
        )
    text = row[column]
    if text is None:
        raise UnfitRowError(f"its {column!r} is null")
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is a {type(text).__name__}, not text")
    if not text or text.isspace():
        raise UnfitRowError(f"its {column!r} is {'white space only' if text else 'empty'}")
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in set(text)):
        raise UserError(f"{where}: {column!r} holds a lone surrogate, which is no Unicode text")
    return text
