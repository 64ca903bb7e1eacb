"""MindRecord files as a list of records that can be read by number."""

import os
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixtral_ms.data.mindrecord.record_file import RecordFile
from mixtral_ms.data.mindrecord.record_header import index_of, parts_of, read_header
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import MINDRECORD, kind_of
from mixtral_ms.file_sets import finish_interrupted_sets
from mixtral_ms.log import get_logger

_COLUMNS = (["input_ids"], ["input_ids", "labels"])
_SEGMENTS = "segment_ids"


class Records(Protocol):
    """What a loader needs to know of its data.

    Attributes:
        columns: names of a record's columns, `input_ids` first.
        facts: what else is known of the records, such as the template of conversations.
    """

    columns: list[str]
    facts: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files that are read."""

    @property
    def identity(self) -> object:
        """What tells this data from other data, but not by where it is."""

    def __len__(self) -> int:
        """How many records there are."""

    def read(self, records: list[int]) -> Generator[list[np.ndarray], None, None]:
        """The columns of some records, in the order asked for."""

    def name_of(self, record: int) -> str:
        """What to call a record in messages: its number and its file."""


class MindRecords:
    """The records of MindRecord files.

    A column segment_ids is read wherever the files have one: packed samples must not see each other
    because a YAML forgot to name it. Columns that are not read are a line in the log.

    Args:
        dataset_dir: as `find_records` takes it.
        input_columns: `input_ids`, and for fine-tuning `labels`.

    Raises UserError for files that are absent, damaged, or without these columns.
    """

    def __init__(
        self, dataset_dir: str | Path | Sequence[str | Path], input_columns: Sequence[str]
    ) -> None:
        self.columns = [name for name in input_columns if name != _SEGMENTS]
        if self.columns not in _COLUMNS:
            raise UserError(
                f"input_columns {list(input_columns)} must be {' or '.join(map(str, _COLUMNS))}"
            )
        self._files = [RecordFile(one) for one in find_records(dataset_dir)]
        if _SEGMENTS in input_columns or any(_SEGMENTS in one.header.types for one in self._files):
            self.columns.append(_SEGMENTS)
        for one in self._files:
            _check_columns(one, self.columns)
        _say_what_is_not_read(self._files, self.columns)
        self._ends = list(accumulate(map(len, self._files)))
        self.identity = [one.size for one in self._files]
        self.facts: Mapping[str, Any] = _common_facts(self._files)

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [one.path for one in self._files]

    def __len__(self) -> int:
        """How many records there are."""
        return self._ends[-1]

    def read(self, records: list[int]) -> Generator[list[np.ndarray], None, None]:
        """The columns of some records, in the order asked for."""
        for record in records:
            file, number = self._find(record)
            yield file.read(number, self.columns)

    def name_of(self, record: int) -> str:
        """What to call a record in messages: its number in its file."""
        file, number = self._find(record)
        return f"record {number} of {file.path}"

    def _find(self, record: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number there."""
        which = bisect_right(self._ends, record)
        return self._files[which], record - (self._ends[which] - len(self._files[which]))


def _say_what_is_not_read(files: list[RecordFile], columns: list[str]) -> None:
    others = sorted({name for one in files for name in one.header.types} - set(columns))
    if others:
        targets = "; every id is learnt, also what labels mask" if "labels" in others else ""
        get_logger().info(
            "%s: not read, since input_columns does not name them: %s%s",
            files[0].path, ", ".join(others), targets,
        )  # fmt: skip


def _common_facts(files: list[RecordFile]) -> dict[str, Any]:
    """What the files' writers say of their records, where all of them say the same."""
    first, *others = files
    facts = first.header.facts
    for one in others:
        if one.header.facts != facts:
            get_logger().warning(
                "%s and %s were made in different ways (from text, or with another chat template): "
                "what a chat should ask with is not known",
                first.path, one.path,
            )  # fmt: skip
            return {}
    return facts


def shared_files(some: Records, others: Records) -> list[Path]:
    """Files of the first that the second reads too, by whatever names and links."""
    known = {(found.st_dev, found.st_ino) for found in map(os.stat, others.files)}
    return [one for one in some.files if (one.stat().st_dev, one.stat().st_ino) in known]


def find_records(dataset_dir: str | Path | Sequence[str | Path]) -> list[Path]:
    """Data files behind a path: a MindRecord file, a partitioned one, a folder, or a list of files.

    Raises UserError when there is none, when one is damaged, or when a partition is missing.
    """
    _finish_interrupted(dataset_dir)
    if not isinstance(dataset_dir, str | Path):
        files = [Path(one) for one in dataset_dir]
    elif not str(dataset_dir):
        raise UserError("no data: give --train_data, or data_loader.dataset_dir in the YAML")
    elif Path(dataset_dir).is_dir():
        found = {_data_file_of(one) for one in Path(dataset_dir).iterdir()}
        files = sorted(filter(_is_data_file, found), key=lambda one: one.name)
    else:
        files = parts_of(Path(dataset_dir))
    if not files:
        raise UserError(
            f"no MindRecord at {dataset_dir!s}: neither such a file nor a folder with "
            "*.mindrecord; make one with tools/dataset_preprocess/llama_preprocess.py"
        )
    for path in files:
        _check_complete(path, files)
    if twice := sorted({str(one) for one in files if files.count(one) > 1}):
        get_logger().info("%s is in the list of data more than once", twice[0])
    # Not resolved: a link may have the name that the record holds, and its target another one.
    return [Path(os.path.abspath(path)) for path in files]


def _finish_interrupted(dataset_dir: str | Path | Sequence[str | Path]) -> None:
    """Put in place what a killed writer had written whole."""
    given = [dataset_dir] if isinstance(dataset_dir, str | Path) else dataset_dir
    paths = [Path(one) for one in given if str(one)]
    for folder in sorted({one if one.is_dir() else one.parent for one in paths}):
        if folder.is_dir():
            finish_interrupted_sets(folder)


def _data_file_of(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".db" and path.stem else path


def _is_data_file(path: Path) -> bool:
    """Whether a folder's entry is a data file: by its index, its usual name, or its beginning.

    So is what is not there, but by the usual name should be: a link leads to nothing, or an index
    is alone. Part of the data is missing then.
    """
    if path.name.startswith(".") or path.suffix == ".jsonl" or path.is_dir():
        return False
    usual = ".mindrecord" in path.name
    if path.is_file():
        return usual or index_of(path).is_file() or kind_of(path) is MINDRECORD
    return usual


def _check_complete(path: Path, files: list[Path]) -> None:
    names = read_header(path).shard_addresses
    given = {one.name for one in files if one.parent == path.parent}
    missing = sorted(set(names) - given)
    if path.name not in names:
        raise UserError(
            f"{path} was renamed: a MindRecord holds its own name, {names[0]!r}; "
            "rename it (and its .db) back, or make it again"
        )
    if missing:
        raise UserError(
            f"{path} is one of {len(names)} partitions, but {missing[0]} is missing from "
            f"{'the list' if (path.parent / missing[0]).is_file() else path.parent}"
        )


def _check_columns(file: RecordFile, columns: list[str]) -> None:
    types = file.header.types
    for name in columns:
        if name not in types:
            asked = "input_columns" + (", or others of the data have it" * (name == _SEGMENTS))
            raise UserError(
                f"{file.path} has no column {name!r} ({asked}); it has {', '.join(types)}"
            )
        if types[name] != "int32" or name not in file.header.blob_fields:
            kind = types[name] if name in file.header.blob_fields else f"a single {types[name]}"
            raise UserError(
                f"{file.path}: column {name!r} is {kind}, but must be an array of int32"
            )
