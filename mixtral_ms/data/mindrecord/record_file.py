"""One MindRecord data file and its index, read without MindSpore.

MindSpore's reader believes the files: a damaged header or index ends the interpreter, a damaged
record is read behind its end, an index that names another record's bytes gives that record. Here
header, index and every record are held against each other first.

A record is its length in 8 bytes and its arrays in the order of the header's blob_fields; where
there are several, the size of each (8 bytes, the highest first) stands before it. An array of
integers is their count (4 bytes, the highest first), two bits for each that give its width (1, 2, 4
or 8 bytes), four to a byte and the first in the highest, and then the integers, lowest byte first.
"""

import os
import sqlite3
import weakref
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from mixtral_ms.data.mindrecord.record_header import RecordHeader, damaged, index_of, read_header
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_as_wanted

_LENGTH_BYTES = 8
_COUNT_BYTES = 4
_INT32_BYTES = 4
_PER_BYTE = 4
# Bytes of each of the four integers whose widths a byte tells.
_SIZES = 1 << ((np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3)
_SQLITE = b"SQLite format 3\0"
_INDEX_ROWS = 1 << 16
_INDEX = (
    "SELECT ROW_ID, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END "
    "FROM INDEXES ORDER BY ROW_ID"
)
_KIND_OF_INDEX = "SELECT type FROM sqlite_master WHERE name = 'INDEXES'"


class RecordFile:
    """The records of one data file.

    The file stays open as long as this object is there, so that its records stay what they are
    when another file takes its place.

    Raises UserError for a file that is no MindRecord, is damaged, or lacks its index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        if self.size < self.header.end:
            raise damaged(path, f"it has {self.size} of at least {self.header.end} bytes")
        self._begins, self._ends = self._positions(_read_index(path, self.header))

    def __len__(self) -> int:
        """How many records there are."""
        return self.header.records

    def read(self, record: int, columns: Sequence[str]) -> list[np.ndarray]:
        """The int32 arrays of a record. Raises UserError for a damaged one."""
        begin, end = int(self._begins[record]), int(self._ends[record])
        try:
            held = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        try:
            arrays = _arrays(held, self.header.blob_fields)
            return [_int32_array(arrays[name]) for name in columns]
        except ValueError as error:
            raise damaged(self.path, f"record {record}: {error}") from error

    def _positions(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last byte of each record in the file, by the index (record, page, offsets)."""
        header = self.header
        if len(index) != len(self) or (index[:, 0] != np.arange(len(index))).any():
            raise damaged(index_of(self.path), f"it does not list records 0 to {len(self) - 1}")
        for page in header.pages:
            rows = index[page.first_record : page.end_record]
            follow = np.append(0, rows[:, 3])  # each record begins where the one before it ends
            offsets = np.append(rows[:, 2], page.used_bytes)
            if (rows[:, 1] != page.number).any() or not np.array_equal(offsets, follow):
                raise damaged(
                    index_of(self.path),
                    f"records {page.first_record} to {page.end_record - 1} do not fill page "
                    f"{page.number}",
                )
        if (index[:, 3] - index[:, 2] < _LENGTH_BYTES).any():
            raise damaged(index_of(self.path), "it lists a record without length")
        pages = header.header_size + header.page_size * index[:, 1]
        return pages + index[:, 2], pages + index[:, 3]


def _read_index(path: Path, header: RecordHeader) -> np.ndarray:
    """Rows (record, page, first byte in it, last byte) of a file's index, in that order."""
    index = index_of(path)
    try:
        with open(index, "rb") as file:
            start = file.read(len(_SQLITE))
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from error
    if start != _SQLITE:
        raise not_as_wanted(index, "a MindRecord's index", "it is no SQLite database")
    # Immutable: nothing is locked or written beside it, which a read-only folder would refuse.
    address = f"{index.absolute().as_uri()}?mode=ro&immutable=1"
    rows = [np.empty((0, 4), np.int64)]
    left = header.records
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            if database.execute(_KIND_OF_INDEX).fetchall() != [("table",)]:
                raise damaged(index, "it has no table INDEXES")
            found = database.execute(_INDEX)
            while left >= 0 and (some := found.fetchmany(_INDEX_ROWS)):
                rows.append(np.array(some))
                left -= len(some)
    except (sqlite3.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(index, str(error)) from error
    if any(one.dtype != np.int64 for one in rows):
        raise damaged(index, "it lists something else than numbers")
    return np.concatenate(rows)


def _arrays(held: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The bytes of each array of a record. Raises ValueError unless they fill it."""
    length = int.from_bytes(held[:_LENGTH_BYTES], "little")
    if length != len(held) - _LENGTH_BYTES:
        raise ValueError(f"it holds {length} bytes, its index gives it {len(held)}")
    if len(names) == 1:
        return {names[0]: held[_LENGTH_BYTES:]}
    arrays = {}
    begin = _LENGTH_BYTES
    for name in names:
        end = begin + _LENGTH_BYTES
        size = int.from_bytes(held[begin:end], "big")
        begin = end + size
        arrays[name] = held[end:begin]
    if begin != len(held):
        raise ValueError("its columns do not fill it")
    return arrays


def _int32_array(held: bytes) -> np.ndarray:
    """The integers of an array of narrowed ones. Raises ValueError unless they fill it."""
    count = int.from_bytes(held[:_COUNT_BYTES], "big")
    body = _COUNT_BYTES + -(-count // _PER_BYTE)
    if body > len(held):
        raise ValueError(f"{count} integers do not fit in {len(held)} bytes")
    bits = np.frombuffer(held, np.uint8, body - _COUNT_BYTES, _COUNT_BYTES)
    sizes = _SIZES[bits].reshape(-1)[:count]
    if sizes.max(initial=0) > _INT32_BYTES or body + int(sizes.sum()) != len(held):
        raise ValueError(f"{count} integers do not fill {len(held)} bytes")
    # Four bytes from wherever an integer begins; those that are not its own are shifted out.
    padded = held[body:] + bytes(_INT32_BYTES)
    words: np.ndarray = np.ndarray((len(held) - body,), "<i4", padded, strides=(1,))
    others = (8 * (_INT32_BYTES - sizes)).astype(np.int32)
    return words[np.cumsum(sizes) - sizes] << others >> others
