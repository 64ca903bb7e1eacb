"""Rows out of Parquet files, a few in memory at a time."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_ms.data.readers.json_rows import Row, counted
from mixtral_ms.data.readers.row_log import listed_keys
from mixtral_ms.data.readers.text_blocks import Advance
from mixtral_ms.errors import MissingDependencyError, UserError
from mixtral_ms.file_kind import not_as_wanted

_BATCH_ROWS = 64
_TEXT_TYPES = {"string", "large_string", "string_view", "null"}


def parquet_rows(path: Path, advance: Advance, text_column: str | None = None) -> Iterator[Row]:
    """Rows of a Parquet file; its bytes are reported in proportion to the rows read.

    Args:
        path: the file.
        advance: told of the bytes.
        text_column: read this column alone, which must hold text.

    Raises UserError, with the rows it is about, without pyarrow, for a file that is no Parquet, is
    damaged, or has no such column.
    """
    file = _open(path)
    with file:
        _check_columns(path, file.schema_arrow, text_column)
        size, total = path.stat().st_size, file.metadata.num_rows
        number = reported = 0
        for batch in _batches(path, file, text_column):
            for value in _values(path, batch, number):
                yield Row(number, counted(number), value)
                number += 1
            done = size * number // max(total, number)
            advance(done - reported)
            reported = done
        if number != total:
            raise UserError(f"{path} is damaged: {number} rows, but by its footer {total}")
        advance(size - reported)


def _open(path: Path) -> Any:
    """A pyarrow ParquetFile."""
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", "parquet", "reading Parquet files") from error
    except ImportError as error:
        raise UserError(f"reading Parquet files: pyarrow does not work here ({error})") from error
    try:
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except _errors() as error:
        raise not_as_wanted(path, "a Parquet file", str(error)) from error


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises of damaged files and of values that Python has no form for."""
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to import

    return (pa.ArrowException, OSError, ValueError, ArithmeticError, MemoryError, KeyError)


def _check_columns(path: Path, schema: Any, text_column: str | None) -> None:
    names = list(schema.names)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path} has the column {twice[0]!r} twice")
    if text_column is None:
        return
    if text_column not in names:
        raise UserError(
            f"{path}: no column {text_column!r}; it has {listed_keys(names)}: "
            "name the one with the text by --text_column"
        )
    kind = schema.field(text_column).type
    values = kind.value_type if hasattr(kind, "index_type") else kind  # of a dictionary
    if str(values) not in _TEXT_TYPES:
        raise UserError(f"{path}: column {text_column!r} is {kind}, not text")


def _batches(path: Path, file: Any, text_column: str | None) -> Iterator[Any]:
    columns = None if text_column is None else [text_column]
    for group in range(file.num_row_groups):
        batches = file.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except _errors() as error:
                raise UserError(f"{path}, row group {group}: {_why(error)}") from error
            if batch is None:
                break
            yield batch


def _values(path: Path, batch: Any, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except _errors() as error:
        which = f"rows {first} to {first + batch.num_rows - 1} (counted from 0)"
        raise UserError(f"{path}, one of {which}: {_why(error)}") from error


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"a text is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return f"damaged, or not to be read ({error})"
