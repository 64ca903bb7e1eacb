"""The header of a MindRecord data file, checked before anything is done by it.

A data file is a header (its size in 8 bytes, then JSON), filled up to `header_size`, and pages of
`page_size` bytes. Arrays of records are in pages of kind BLOB_DATA. The index beside it (`.db`)
says where in its page each record is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import MINDRECORD, kind_of, not_as_wanted, require_file
from mixtral_ms.json_reader import JsonShape, decode_json, require_shape

_VERSION = "3.0"
_MAX_HEADER = 1 << 27
_MAX_SIZE = 1 << 40
_ARRAYS = "BLOB_DATA"
_SHAPE: JsonShape = {
    "version": str,
    "header_size": int,
    "page_size": int,
    "shard_addresses": [str],
    "schema": [{"desc?": str, "schema": {str: {"type": str}}, "blob_fields": [str]}],
    "page": [
        {
            "page_type": str,
            "page_id": int,
            "page_size": int,
            "start_row_id": int,
            "end_row_id": int,
        }
    ],
}


@dataclass(frozen=True)
class BlobPage:
    """A page of arrays: its number in the file, bytes in use, and the records in it."""

    number: int
    used_bytes: int
    first_record: int
    end_record: int


@dataclass(frozen=True)
class RecordHeader:
    """What a data file says of itself.

    Attributes:
        shard_addresses: names of all files of the record set, this one's among them.
        types: type of each column, by name.
        blob_fields: columns that are arrays, in the order in which a record holds them.
        header_size: bytes before the first page.
        page_size: bytes from page to page.
        pages: those of arrays, in the order of their records, which follow each other without gap.
        end: bytes that the file has at least, so that all pages are in it.
        note: its schema's description.
    """

    shard_addresses: list[str]
    types: dict[str, str]
    blob_fields: list[str]
    header_size: int
    page_size: int
    pages: list[BlobPage]
    end: int
    note: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What its writer wrote of the records beside their columns; nothing for other writers'."""
        try:
            facts = decode_json(self.note)
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}

    @property
    def records(self) -> int:
        """How many records the file has."""
        return self.pages[-1].end_record if self.pages else 0


def damaged(path: Path, what: str) -> UserError:
    """The error for a data file, or its index, that says something that cannot be."""
    return UserError(f"{path} is damaged ({what}); copy it and its .db again, or make it again")


def index_of(path: Path) -> Path:
    """The index that belongs to a data file."""
    return path.with_name(path.name + ".db")


def read_header(path: Path) -> RecordHeader:
    """The header of a data file.

    Raises UserError for a file that is no MindRecord, is damaged, or lacks its index.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if 0 < size < _MAX_HEADER else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if not text:
            raise ValueError("it does not begin with a header")
        values = decode_json(text.decode())
        require_shape(values, _SHAPE, "its header", ValueError)
        header = _header(path, values)
    except ValueError as error:
        if kind_of(path) is MINDRECORD:
            raise damaged(path, str(error)) from None
        raise not_as_wanted(path, "a MindRecord", f"{error}; make it again") from None
    index = index_of(path)
    if index.exists() or index.is_symlink():
        require_file(index)
    else:
        raise UserError(
            f"{path} has no index {index.name} beside it: it was not written to the end, "
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
            names = read_header(first).shard_addresses
            if len(names) > 1:
                return [path.with_name(name) for name in names]
    return []


def _header(path: Path, values: Mapping[str, Any]) -> RecordHeader:
    """Takes a header's values. Raises ValueError for the first that cannot be."""
    if values["version"] != _VERSION:
        raise UserError(
            f"{path} is a MindRecord of version {values['version']!r}; those of version {_VERSION} "
            "can be read: write it again with a MindSpore of today"
        )
    (schema,) = values["schema"][:1] or [{"schema": {}, "blob_fields": []}]
    header_size, page_size = _size(values, "header_size"), _size(values, "page_size")
    ends = [
        header_size + page_size * _size(one, "page_id") + _size(one, "page_size")
        for one in values["page"]
    ]
    names, blob_fields = values["shard_addresses"], schema["blob_fields"]
    if not names or len(set(names)) < len(names) or any(not one or "/" in one for one in names):
        raise ValueError(f"shard_addresses {names} in its header")
    if len(set(blob_fields)) < len(blob_fields) or not set(blob_fields) <= set(schema["schema"]):
        raise ValueError(f"blob_fields {blob_fields} in its header")
    return RecordHeader(
        shard_addresses=names,
        types={name: one["type"] for name, one in schema["schema"].items()},
        blob_fields=blob_fields,
        header_size=header_size,
        page_size=page_size,
        pages=_pages(values["page"], page_size),
        end=max(ends, default=header_size),
        note=schema.get("desc", ""),
    )


def _pages(listed: list[dict[str, Any]], page_size: int) -> list[BlobPage]:
    pages = [
        BlobPage(
            number=_size(one, "page_id"),
            used_bytes=_size(one, "page_size"),
            first_record=_size(one, "start_row_id"),
            end_record=_size(one, "end_row_id"),
        )
        for one in listed
        if one["page_type"] == _ARRAYS
    ]
    pages.sort(key=lambda one: (one.first_record, one.end_record))
    begin = 0
    for page in pages:
        if page.first_record != begin or page.end_record < begin:
            raise ValueError("its header's pages do not follow each other")
        if page.used_bytes > page_size:
            raise ValueError(f"page_size {page.used_bytes} of a page of {page_size} in its header")
        begin = page.end_record
    if len({one.number for one in pages}) < len(pages):
        raise ValueError("its header has a page_id twice")
    return pages


def _size(values: Mapping[str, Any], key: str) -> int:
    value: int = values[key]
    if not 0 <= value < _MAX_SIZE:
        raise ValueError(f"{key} {value} in its header")
    return value
