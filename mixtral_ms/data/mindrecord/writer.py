"""Write MindRecord files that are whole or absent.

A MindRecord is a data file and an index (`.db`), or one such pair per partition. Both hold the
files' own names, so they can be moved to another folder but never renamed: writing goes to a
folder beside the target, under the final names, from where the files are moved.

What belongs to the records, a listing of rows, say, is written with them: in that folder too.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mixtral_ms.data.mindrecord.record_file import RecordFile
from mixtral_ms.data.mindrecord.record_header import index_of, parts_of
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.file_sets import new_file_set, put_set_in_place
from mixtral_ms.files import not_an_input

_FORBIDDEN = set("\\/:*?\"<>|`&';")
_MAX_PARTITIONS = 1000
_SMALL_BYTES = 32 << 20
# MindRecord's defaults cost 50 MB a file however little it holds; these hold up to _SMALL_BYTES.
_SMALL_HEADER = 1 << 16
_SMALL_PAGE = 1 << 18
_DEFAULT_PAGE = 1 << 25
_MAX_PAGE = 1 << 28
_BATCH_RECORDS = 1000
_BATCH_BYTES = 4 << 20

MAX_RECORD_LENGTH = _MAX_PAGE // 16
"""Ids a record may have at most, so that it fits a page."""


class RecordWriter:
    """Writes records of int32 columns of equal length as a MindRecord; a context manager.

    Nothing is at `path` before the block ends without an error; then all files are, and their
    records have been counted. What was there is there until then, whatever ends the process.
    With several partitions the files are `path` followed by 0, 1, …, and the records are dealt out
    to them a stretch at a time.

    Args:
        path: the MindRecord to write.
        columns: names of the columns.
        partitions: into how many files.
        overwrite: replace what is there.
        beside: ends of the names of files that belong to the records, see `beside`.
        facts: what else the header is to say of the records, for `RecordHeader.facts`.

    Attributes:
        records: how many have been written.
        files: the data files, when the block has ended.
        replaced: what was there and will be replaced.

    Raises UserError for an existing output (unless `overwrite`), now or when all is written, for a
    name MindRecord refuses, and when entered while another process writes the same output.
    """

    def __init__(
        self,
        path: str | Path,
        columns: tuple[str, ...] = ("input_ids",),
        *,
        partitions: int = 1,
        overwrite: bool = False,
        beside: tuple[str, ...] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.columns = columns
        self.partitions = partitions
        self.records = 0
        self.files: list[Path] = []
        self._overwrite = overwrite
        self._beside = beside
        self._note = json.dumps(facts) if facts else "mixtral_ms"
        self.replaced = self._check_target()
        self._stack = contextlib.ExitStack()
        self._aside = self.path  # a folder of its own from __enter__ on
        self._writer: Any = None
        self._record_shape: tuple[int, ...] | None = None
        self._held: list[dict[str, np.ndarray]] = []
        self._held_bytes = 0

    def __enter__(self) -> "RecordWriter":
        self._aside = self._stack.enter_context(new_file_set(self.path))
        self._stack.callback(self._close)
        self._check_target()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._commit()

    def _close(self) -> None:
        self._writer = None

    def keep_inputs(self, model_file: str, inputs: Sequence[Path]) -> None:
        """Raise UserError when what the records are made from would be replaced by them."""
        given = [("--model_file", model_file), *(("--input_glob", str(one)) for one in inputs)]
        for path in self.replaced:
            not_an_input(path, "--output_file", given)

    def beside(self, end: str) -> Path:
        """Where to write, inside the block, the file beside the records whose name ends so."""
        return self._aside / (self.path.name + end)

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
        with self._naming_errors():
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
        writer.add_schema(schema, self._note)
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
        with self._naming_errors():
            if self._writer is None:
                self._open(small=True)
            self._writer.commit()
        written = _target_files(self._aside / self.path.name, self.partitions)
        counted = sum(len(RecordFile(one)) for one in written)
        if counted != self.records:
            raise RuntimeError(
                f"MindRecord kept {counted} of {self.records} records; nothing was written to "
                f"{self.path}"
            )
        replaced = self._check_target()  # once more: it is some time ago
        # The indexes last: a data file without one is never read.
        ends = [self.beside(end).name for end in self._beside if self.beside(end).exists()]
        new = [*ends, *(one.name for one in written), *(index_of(one).name for one in written)]
        put_set_in_place(self._aside, new, [one.name for one in replaced])
        self.files = [self.path.parent / one.name for one in written]

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Make MindSpore's errors of writing the system's, with the file and how much room is left.

        Of a full disk it says only that there is none, or that it could not go on.
        """
        from mindspore.mindrecord.common.exceptions import (  # noqa: PLC0415 - slow to import
            MindRecordException,
        )

        try:
            yield
        except (RuntimeError, MindRecordException) as error:
            found = re.search(r"\[ERROR\] (.+)", str(error))
            free = shutil.disk_usage(self._aside).free
            what = f"{found.group(1) if found else error} ({free:,} bytes are free there)"
            raise OSError(errno.EIO, what, str(self.path)) from error

    def _existing_files(self) -> list[Path]:
        """Files that writing would replace, or that were written under the same name before."""
        targets = _target_files(self.path, self.partitions)
        try:
            before = parts_of(self.path)
        except UserError:  # something else than a record set: only what is in the way counts
            before = []
        files = {one for data in (*targets, *before) for one in (data, index_of(data))}
        files |= {self.path.with_name(self.path.name + end) for end in self._beside}
        return sorted(one for one in files if os.path.lexists(one))

    def _check_target(self) -> list[Path]:
        """Files that will be replaced. Raises UserError unless the output may be written."""
        name = self.path.name
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"MindRecord cannot have a path that is not UTF-8: {str(self.path)!a}; "
                "give another --output_file"
            ) from error
        bad = sorted(set(name) & _FORBIDDEN)
        if bad or name != name.strip():
            raise UserError(
                f"MindRecord cannot have a file named {name!r}: it may not begin or end with a "
                f"space or contain any of {''.join(sorted(_FORBIDDEN))}"
            )
        if not 1 <= self.partitions <= _MAX_PARTITIONS:
            raise UserError(f"{self.partitions} partitions: allowed are 1 to {_MAX_PARTITIONS}")
        if self.path.is_dir():
            raise UserError(
                f"{self.path} is a folder; name a file, for example {self.path}/wiki.mindrecord"
            )
        existing = self._existing_files()
        for one in existing:
            require_file(one)
        if existing and not self._overwrite:
            raise UserError(
                f"{existing[0]} exists; give --overwrite to replace it, or another --output_file"
            )
        return existing


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


def _target_files(path: Path, partitions: int) -> list[Path]:
    """The data files that FileWriter makes."""
    if partitions == 1:
        return [path]
    width = len(str(partitions - 1))
    return [path.with_name(f"{path.name}{part:0{width}}") for part in range(partitions)]
