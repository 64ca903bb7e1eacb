"""MindRecord files as a list of records that can be read by number."""

import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

import mindspore.dataset as ds
import numpy as np

from mixtral_ms.data.mindrecord.writer import count_records, index_of, parts_of, read_header
from mixtral_ms.errors import UserError

_COLUMNS = (["input_ids"], ["input_ids", "labels"])
_SEGMENTS = "segment_ids"


class Records(Protocol):
    """What a loader needs to know of its data.

    Attributes:
        columns: names of a record's columns, `input_ids` first.
        where: what to call the data's folder in messages.
    """

    columns: list[str]
    where: str

    @property
    def identity(self) -> object:
        """What tells this data from other data, but not by where it is."""

    def __len__(self) -> int:
        """How many records there are."""

    def read(self, records: list[int]) -> Generator[list[np.ndarray], None, None]:
        """The columns of some records, none of them twice, in the order asked for."""


class MindRecords:
    """The records of MindRecord files.

    A column segment_ids is read wherever the files have one: packed samples must not see each other
    because a YAML forgot to name it.

    Args:
        dataset_dir: as `find_records` takes it.
        input_columns: `input_ids`, and for fine-tuning `labels`.

    Raises UserError for files that are absent, damaged, or without these columns.
    """

    def __init__(
        self, dataset_dir: str | Path | Sequence[str | Path], input_columns: Sequence[str]
    ) -> None:
        self.files = find_records(dataset_dir)
        self.where = str(self.files[0].parent)
        self.columns = [name for name in input_columns if name != _SEGMENTS]
        if self.columns not in _COLUMNS:
            raise UserError(
                f"input_columns {list(input_columns)} must be {' or '.join(map(str, _COLUMNS))}"
            )
        if _SEGMENTS in input_columns or _SEGMENTS in _schema(self.files[0]):
            self.columns.append(_SEGMENTS)
        _check_columns(self.files, self.columns)
        self._count = sum(count_records(one) for one in self.files)
        self.identity = [one.stat().st_size for one in self.files]

    def __len__(self) -> int:
        """How many records there are."""
        return self._count

    def read(self, records: list[int]) -> Generator[list[np.ndarray], None, None]:
        """The columns of some records, none of them twice, in the order asked for."""
        try:
            data = ds.MindDataset(
                [str(one) for one in self.files],
                columns_list=self.columns,
                sampler=ds.SubsetSampler(records),
                num_parallel_workers=1,  # more are no faster here
            )
            iterator = data.create_tuple_iterator(num_epochs=1, output_numpy=True)
            try:
                yield from iterator
            finally:
                iterator.stop()  # ends its threads, also when a reader leaves in mid epoch
        except RuntimeError as error:
            raise UserError(f"{self.where}: {_mindspore_message(error)}") from error


def find_records(dataset_dir: str | Path | Sequence[str | Path]) -> list[Path]:
    """Data files behind a path: a MindRecord file, a partitioned one, a folder, or a list of files.

    Raises UserError when there is none, when one is damaged, or when a partition is missing.
    """
    if not isinstance(dataset_dir, str | Path):
        files = [Path(one) for one in dataset_dir]
    elif not str(dataset_dir):
        raise UserError("no data: give --train_data, or data_loader.dataset_dir in the YAML")
    elif Path(dataset_dir).is_dir():
        names = (one for one in Path(dataset_dir).iterdir() if _is_data_file(one))
        files = sorted(names, key=lambda one: one.name)
    else:
        files = parts_of(Path(dataset_dir))
    if not files:
        raise UserError(
            f"no MindRecord at {dataset_dir!s}: neither such a file nor a folder with "
            "*.mindrecord; make one with tools/dataset_preprocess/llama_preprocess.py"
        )
    for path in files:
        _check_complete(path, files)
    return [path.resolve() for path in files]


def _is_data_file(path: Path) -> bool:
    """Whether a folder's entry is a data file: by its index, or by its usual name."""
    if path.name.startswith(".") or path.suffix in (".db", ".jsonl") or not path.is_file():
        return False
    return index_of(path).is_file() or ".mindrecord" in path.name


def _check_complete(path: Path, files: list[Path]) -> None:
    names = read_header(path)["shard_addresses"]
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


def _schema(path: Path) -> dict[str, Any]:
    """Columns of one file, by name."""
    return read_header(path)["schema"][0]["schema"]


def _check_columns(files: list[Path], columns: list[str]) -> None:
    for path in files:
        schema = _schema(path)
        for name in columns:
            if name not in schema:
                raise UserError(
                    f"{path} has no column {name!r} (input_columns); it has {', '.join(schema)}"
                )
            if schema[name].get("type") != "int32":
                raise UserError(
                    f"{path}: column {name!r} is {schema[name].get('type')}, but must be int32"
                )


def _mindspore_message(error: RuntimeError) -> str:
    """The one telling line of MindSpore's long messages."""
    found = re.search(r"\[ERROR\] (.+)", str(error))
    return f"cannot read the records: {found.group(1) if found else error}"
