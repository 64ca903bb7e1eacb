"""Write MindRecord files that are whole or absent, and read what their header says.

A MindRecord is a data file and an index (`.db`), or one such pair per partition. Both hold the
files' own names, so they can be moved to another folder but never renamed: writing goes to a
folder beside the target, under the final names, from where the files are moved.
"""

import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path

_FORBIDDEN = set("\\/:*?\"<>|`&';")
_MAX_PARTITIONS = 1000
_SMALL_BYTES = 32 << 20
# MindRecord's defaults cost 50 MB a file however little it holds; these hold up to _SMALL_BYTES.
_SMALL_HEADER = 1 << 16
_SMALL_PAGE = 1 << 18
_DEFAULT_PAGE = 1 << 25
_MAX_PAGE = 1 << 28
_MAX_HEADER = 1 << 27
_BATCH_RECORDS = 1000
_BATCH_BYTES = 4 << 20

MAX_RECORD_LENGTH = _MAX_PAGE // 16
"""Ids a record may have at most, so that it fits a page."""


class RecordWriter:
    """Writes records of int32 columns of equal length as a MindRecord; a context manager.

    Nothing is at `path` before the block ends without an error; then all files are, and their
    records have been counted. With several partitions the files are `path` followed by 0, 1, …, and
    the records are dealt out to them a stretch at a time.

    Raises UserError for an existing output (unless `overwrite`) or a name MindRecord refuses.
    """

    def __init__(
        self,
        path: str | Path,
        columns: tuple[str, ...] = ("input_ids",),
        *,
        partitions: int = 1,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.columns = columns
        self.partitions = partitions
        self.records = 0
        self.files: list[Path] = []
        _check_target(self.path, partitions, overwrite)
        self._aside = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp"
        self._writer: Any = None
        self._record_shape: tuple[int, ...] | None = None
        self._held: list[dict[str, np.ndarray]] = []
        self._held_bytes = 0

    def __enter__(self) -> "RecordWriter":
        self._aside.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._writer = None
            shutil.rmtree(self._aside, ignore_errors=True)

    def batch_records(self, record_length: int) -> int:
        """Rows to hand to `write` at a time: enough for speed, few enough for memory."""
        record_bytes = 4 * record_length * len(self.columns)
        return max(1, min(_BATCH_RECORDS, _BATCH_BYTES // record_bytes))

    def write(self, **columns: np.ndarray) -> None:
        """Append records, an int32 array (records, record_length) per column.

        Raises ValueError for another type or shape: MindRecord drops such records without an error.
        """
        self._check_columns(columns)
        records = len(columns[self.columns[0]])
        if not records:
            return
        self.records += records
        if self._writer is not None:
            self._write_now(columns)
            return
        self._held.append(columns)
        self._held_bytes += sum(one.nbytes for one in columns.values())
        if self._held_bytes > _SMALL_BYTES:
            self._open(small=False)

    def _check_columns(self, columns: Mapping[str, np.ndarray]) -> None:
        if set(columns) != set(self.columns):
            raise ValueError(f"columns {sorted(columns)} are not {sorted(self.columns)}")
        for name, ids in columns.items():
            if ids.dtype != np.int32 or ids.ndim != 2:
                raise ValueError(
                    f"column {name!r} is {ids.dtype} of shape {ids.shape}, not int32 of two axes"
                )
        shapes = {ids.shape for ids in columns.values()}
        lengths = {shape[1:] for shape in shapes} | ({self._record_shape} - {None})
        if len(shapes) > 1 or len(lengths) > 1:
            raise ValueError(f"columns of unlike shapes {sorted(shapes)}; records are {lengths}")
        (self._record_shape,) = lengths

    def _open(self, small: bool) -> None:
        from mindspore.mindrecord import FileWriter  # noqa: PLC0415 - slow to import

        writer = FileWriter(str(self._aside / self.path.name), shard_num=self.partitions)
        record_bytes = sum(ids[0].nbytes for ids in self._held[0].values())
        page = 1 << (2 * record_bytes).bit_length()
        if small:
            page = max(page, _SMALL_PAGE)
            writer.set_header_size(_SMALL_HEADER)
            writer.set_page_size(page)
        elif page > _DEFAULT_PAGE:
            writer.set_page_size(min(page, _MAX_PAGE))
        schema = {name: {"type": "int32", "shape": [-1]} for name in self.columns}
        writer.add_schema(schema, "mixtral_ms")
        _keep_schema(writer)
        self._writer = writer
        for columns in self._held:
            self._write_now(columns)
        self._held = []

    def _write_now(self, columns: Mapping[str, np.ndarray]) -> None:
        arrays = [columns[name] for name in self.columns]
        step = self.batch_records(arrays[0].shape[1])
        for start in range(0, len(arrays[0]), step):
            records = zip(*(one[start : start + step] for one in arrays), strict=True)
            self._writer.write_raw_data(
                [dict(zip(self.columns, record, strict=True)) for record in records]
            )

    def _commit(self) -> None:
        if not self.records:
            raise UserError(f"no records to write to {self.path}")
        if self._writer is None:
            self._open(small=True)
        self._writer.commit()
        written = _target_files(self._aside / self.path.name, self.partitions)
        counted = sum(count_records(one) for one in written)
        if counted != self.records:
            raise RuntimeError(
                f"MindRecord kept {counted} of {self.records} records; nothing was written to "
                f"{self.path}"
            )
        self.files = self._move(written)

    def _move(self, written: list[Path]) -> list[Path]:
        """Put the files in place, the indexes last: a data file without one is never read."""
        for old in reversed(_existing_files(self.path, self.partitions)):
            old.unlink()
        for data in written:
            fsync_path(data)
            fsync_path(index_of(data))
            os.replace(data, self.path.parent / data.name)
        for data in written:
            os.replace(index_of(data), self.path.parent / index_of(data).name)
        fsync_path(self.path.parent)
        return [self.path.parent / data.name for data in written]


class _KnownHeader:
    """A FileWriter's header that answers from memory what the schema is."""

    def __init__(self, header: Any) -> None:
        self._header = header
        self.schema, self.blob_fields = header.schema, header.blob_fields

    def __getattr__(self, name: str) -> Any:
        return getattr(self._header, name)


def _keep_schema(writer: Any) -> None:
    """Spare a FileWriter asking C++ for its schema five times a record, a sixth of the time."""
    header = getattr(writer, "_header", None)
    if hasattr(header, "schema") and hasattr(header, "blob_fields"):
        writer._header = _KnownHeader(header)  # noqa: SLF001 - there is no public way


def index_of(path: Path) -> Path:
    """The index that belongs to a data file."""
    return path.with_name(path.name + ".db")


def count_records(path: Path) -> int:
    """Records that the index of one data file lists."""
    with closing(sqlite3.connect(f"{index_of(path).as_uri()}?mode=ro", uri=True)) as index:
        return index.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]


def read_header(path: Path) -> dict[str, Any]:
    """The header of a MindRecord data file: `schema`, `shard_addresses` and more.

    Raises UserError for a file that is no MindRecord or lacks its index.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 0 < size < _MAX_HEADER else None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except ValueError:
        header = None
    if not isinstance(header, dict) or "shard_addresses" not in header:
        raise UserError(f"{path} is not a MindRecord file, or is damaged; make it again")
    if not index_of(path).is_file():
        raise UserError(
            f"{path} has no index {index_of(path).name} beside it: it was not written to the end, "
            "or was copied without it; copy both or make it again"
        )
    return header


def parts_of(path: Path) -> list[Path]:
    """Data files of the MindRecord named `path`: itself, or its numbered partitions if it has any.

    The header says which files are partitions of one record set; names alone do not, since `wiki`
    and `wiki4096` may be two sets.
    """
    if path.is_file():
        return [path]
    for zeros in ("0", "00", "000"):
        first = path.with_name(path.name + zeros)
        if first.is_file():
            names = read_header(first)["shard_addresses"]
            if len(names) > 1:
                return [path.with_name(name) for name in names]
    return []


def _target_files(path: Path, partitions: int) -> list[Path]:
    """The data files that FileWriter makes."""
    if partitions == 1:
        return [path]
    width = len(str(partitions - 1))
    return [path.with_name(f"{path.name}{part:0{width}}") for part in range(partitions)]


def _existing_files(path: Path, partitions: int) -> list[Path]:
    """Files that writing `path` would replace, or that were written under the same name before."""
    targets = _target_files(path, partitions)
    targets += [index_of(one) for one in targets]
    existing = {one for one in targets if one.exists()}
    try:
        before = parts_of(path)
    except UserError:  # something else than a record set: only what is in the way counts
        before = []
    existing |= {one for data in before for one in (data, index_of(data)) if one.exists()}
    return sorted(existing)


def _check_target(path: Path, partitions: int, overwrite: bool) -> None:
    bad = sorted(set(path.name) & _FORBIDDEN)
    if bad or path.name != path.name.strip():
        raise UserError(
            f"MindRecord cannot have a file named {path.name!r}: it may not begin or end with a "
            f"space or contain any of {''.join(sorted(_FORBIDDEN))}"
        )
    if not 1 <= partitions <= _MAX_PARTITIONS:
        raise UserError(f"{partitions} partitions: allowed are 1 to {_MAX_PARTITIONS}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, for example {path}/wiki.mindrecord")
    existing = _existing_files(path, partitions)
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} exists; give --overwrite to replace it, or another --output_file"
        )
