"""Rows out of a file, whichever of JSON, JSON Lines and Parquet it is."""

from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.data.readers.json_rows import Row, json_rows
from mixtral_ms.data.readers.parquet_rows import parquet_rows
from mixtral_ms.data.readers.text_blocks import Advance
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import kind_of

JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
PARQUET_SUFFIXES = {".parquet", ".pq"}


def read_rows(path: Path, advance: Advance, text_column: str | None = None) -> Iterator[Row]:
    """The rows of one file: a JSON list, one JSON value a line, or a Parquet table.

    Args:
        path: its suffix tells Parquet from JSON, its first character a list from lines.
        advance: told of the bytes as they are read.
        text_column: of a Parquet table read only this column, which must hold text.

    Raises UserError, with the row or the line, for what is no JSON or no Parquet.
    """
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return parquet_rows(path, advance, text_column)
    if suffix in JSON_SUFFIXES:
        return json_rows(path, advance)
    known = ", ".join(sorted(JSON_SUFFIXES | PARQUET_SUFFIXES))
    kind = kind_of(path)
    what = f"; it is {kind.name}: {kind.advice}" if kind else ""
    raise UserError(f"{path}: rows are read from {known} files{what}")
