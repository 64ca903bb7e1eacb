"""Documents of JSON Lines and Parquet files: one row, one document, text in a named column."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_ms.data.readers.json_and_parquet import JSON_SUFFIXES, PARQUET_SUFFIXES, open_parquet
from mixtral_ms.data.readers.text_blocks import LONG_TEXT, Advance, DocumentPart
from mixtral_ms.data.tokenizer.tokenizer import split_at_spaces
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_utf8

_PARQUET_ROWS = 64


def read_wikipedia(
    path: Path, advance: Advance, *, text_column: str, split_long: bool
) -> Iterator[DocumentPart]:
    """Documents of one .jsonl or .parquet file, a few rows in memory at a time.

    Rows without text are left out. Raises UserError, with the line, for a row that is no JSON
    object, has no `text_column`, or holds something else than text there.
    """
    if path.suffix.lower() in PARQUET_SUFFIXES:
        texts = _parquet_texts(path, advance, text_column)
    elif path.suffix.lower() in JSON_SUFFIXES:
        texts = _json_texts(path, advance, text_column)
    else:
        raise UserError(
            f"{path}: dataset type wikipedia reads {', '.join(sorted(PARQUET_SUFFIXES))} and "
            f"{', '.join(sorted(JSON_SUFFIXES))} files; for plain text use --dataset_type wiki"
        )
    for text in texts:
        parts = split_at_spaces(text, LONG_TEXT) if split_long else iter((text,))
        yield from _parts(parts)


def _parts(parts: Iterator[str]) -> Iterator[DocumentPart]:
    """Parts of one document, the first and the last marked."""
    held = next(parts)
    starts = True
    for part in parts:
        yield DocumentPart(held, starts, False)
        held, starts = part, False
    if held or not starts:
        yield DocumentPart(held, starts, True)


def _json_texts(path: Path, advance: Advance, column: str) -> Iterator[str]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield _text_of(_json_row(path, where, line, offset), column, where)
            offset += len(line)
            advance(len(line))


def _json_row(path: Path, where: str, line: bytes, offset: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start, error) from error
    except ValueError as error:
        raise UserError(
            f"{where}: not a JSON object ({error}); each line must be one object"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, but each line must be one JSON object")
    return row


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(
            f"{where}: no {column!r}; it has {', '.join(map(repr, row)) or 'no keys'}: "
            "name the one with the text by --text_column"
        )
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is a {type(text).__name__}, not text")
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in set(text)):
        raise UserError(f"{where}: {column!r} holds a lone surrogate, which is no Unicode text")
    return text


def _parquet_texts(path: Path, advance: Advance, column: str) -> Iterator[str]:
    file = open_parquet(path)
    with file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise UserError(
                f"{path}: no column {column!r}; it has {', '.join(map(repr, schema.names))}: "
                "name the one with the text by --text_column"
            )
        kind = schema.field(column).type
        if str(kind) not in ("string", "large_string"):
            raise UserError(f"{path}: column {column!r} is {kind}, not text")
        yield from _parquet_rows(path, file, column, advance)


def _parquet_rows(path: Path, file: Any, column: str, advance: Advance) -> Iterator[str]:
    """Texts of a Parquet file; its bytes are reported in proportion to the rows read."""
    size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
    rows = reported = 0
    for batch in file.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
        for value in batch.column(0):
            yield value.as_py() or ""
        rows += batch.num_rows
        advance(size * rows // total - reported)
        reported = size * rows // total
