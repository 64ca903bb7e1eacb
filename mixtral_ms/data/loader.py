"""Batches of training records out of MindRecord files, in an order that can be resumed.

Legend: B batch, S sequence, V vocabulary.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
import numpy as np

from mixtral_ms.config.data_sections import DatasetSection
from mixtral_ms.data.batch import Batch
from mixtral_ms.data.mindrecord import count_records, index_of, parts_of, read_header
from mixtral_ms.errors import UserError

_NO_RECORD = -1
_COLUMNS = (["input_ids"], ["input_ids", "labels"])


class RecordLoader:
    """Reads records of seq_length + 1 ids as batches (inputs ids[:-1], labels ids[1:]).

    The order is a pure function of (seed, epoch). Batch i is made of the records at i*B*world to
    (i+1)*B*world - 1 of that order, of which rank r takes every world-th from r on. So what a step
    sees does not depend on how many ranks share it, and `batches(epoch, start_batch)` continues
    exactly where a run stopped.

    Args:
        section: `train_dataset` or `eval_dataset`; `data_loader.dataset_dir` is a MindRecord file,
            a partitioned one, or a folder of them; `data_loader.num_samples` limits the records
            to the first so many.
        seq_length: ids of an input.
        batch_size: rows of a batch of one rank.
        seed: orders the records, together with the epoch.
        shuffle: False keeps the records' own order.
        ignore_token_id: label that means "no target".
        pad_token_id: labels with this id become ignore_token_id; negative: there is no padding.
        rank: this process among those that share the data.
        world: how many processes share the data.
        vocab_size: ids must be below it; None skips the check.
        keep_partial: the last batch may hold fewer rows (evaluation); otherwise they are left out.
            With several ranks all get equally many rows, filled up with rows without any target.

    Raises UserError for data that is absent, damaged or does not fit; for a record found to be
    unfit only when it is read.
    """

    def __init__(  # noqa: PLR0913 - one keyword per fact about the data
        self,
        section: DatasetSection,
        *,
        seq_length: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        ignore_token_id: int,
        pad_token_id: int,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
        keep_partial: bool = False,
    ) -> None:
        self.files = find_records(section.data_loader.dataset_dir)
        self.columns = list(section.input_columns)
        if self.columns not in _COLUMNS:
            raise UserError(
                f"input_columns {self.columns} must be {' or '.join(map(str, _COLUMNS))}"
            )
        _check_columns(self.files, self.columns)
        self.seq_length = seq_length
        self.batch_size = batch_size
        self._seed, self._shuffle = seed, shuffle
        self._ignore, self._pad = ignore_token_id, pad_token_id
        self._rank, self._world = rank, world
        self._vocab_size = vocab_size
        self._keep_partial = keep_partial
        self.total_records = sum(count_records(one) for one in self.files)
        limit = section.data_loader.num_samples
        self.records = min(self.total_records, limit) if limit else self.total_records
        if not len(self):
            raise UserError(
                f"{section.data_loader.dataset_dir} has {self.records} records, fewer than one "
                f"batch of {batch_size} rows on each of {world} ranks; make the batch smaller or "
                "give more data"
            )
        for record, row in zip(self._ends, self._read(self._ends), strict=True):
            self._check_row(row, record)

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.records, self.batch_size * self._world)
        return whole + bool(rest and self._keep_partial)

    @property
    def fingerprint(self) -> str:
        """Short hash of the data: sizes of the files, records, and the first and last record.

        It does not change when the files are moved.
        """
        digest = hashlib.sha256()
        sizes = [one.stat().st_size for one in self.files]
        digest.update(repr((sizes, self.total_records, self.records, self.columns)).encode())
        for row in self._read(self._ends):
            for column in row:
                digest.update(column.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_batch` on, for this rank."""
        order = self._order(epoch)
        shares = [self._share(order, batch) for batch in range(start_batch, len(self))]
        if not shares:
            return
        rows = self._read([one for share in shares for one in share if one != _NO_RECORD])
        with closing(rows):
            for share in shares:
                yield self._batch(share, rows)

    @property
    def _ends(self) -> list[int]:
        """The first and the last record; MindDataset refuses to read one twice."""
        return sorted({0, self.records - 1})

    def _order(self, epoch: int) -> np.ndarray:
        """Record numbers in the order of an epoch."""
        if not self._shuffle:
            return np.arange(self.records)
        # RandomState's stream is frozen for good, so that a resumed run may use another NumPy.
        bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(bits).permutation(self.records)

    def _share(self, order: np.ndarray, batch: int) -> list[int]:
        """Records of this rank in a global batch, filled up to as many as the other ranks have."""
        size = self.batch_size * self._world
        everyone = order[batch * size : (batch + 1) * size]
        mine = everyone[self._rank :: self._world].tolist()
        return mine + [_NO_RECORD] * (-(-len(everyone) // self._world) - len(mine))

    def _batch(self, share: list[int], rows: Iterator[list[np.ndarray]]) -> Batch:
        inputs_BS = np.zeros((len(share), self.seq_length), np.int32)
        labels_BS = np.full((len(share), self.seq_length), self._ignore, np.int32)
        for place, record in enumerate(share):
            if record != _NO_RECORD:
                row = next(rows)
                self._check_row(row, record)
                inputs_BS[place] = row[0][:-1]
                labels_BS[place] = row[-1][1:]
        if self._pad >= 0:
            labels_BS[labels_BS == self._pad] = self._ignore
        return Batch(inputs_BS, labels_BS)

    def _read(self, records: list[int]) -> Iterator[list[np.ndarray]]:
        """The columns of some records, in the order asked for."""
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
            raise UserError(f"{self.files[0].parent}: {_mindspore_message(error)}") from error

    def _check_row(self, row: list[np.ndarray], record: int) -> None:
        """Raise UserError, with the record's number, unless the row fits the model."""
        wanted = self.seq_length + 1
        for name, ids in zip(self.columns, row, strict=True):
            if len(ids) != wanted:
                raise UserError(
                    f"record {record} of {self.files[0].parent} has {len(ids)} {name}, but "
                    f"seq_length {self.seq_length} needs records of {wanted}: {_advice(len(ids))}"
                )
        low, high = int(row[0].min()), int(row[0].max())
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            limit = "" if self._vocab_size is None else f" and below vocab_size {self._vocab_size}"
            raise UserError(
                f"record {record} of {self.files[0].parent} has the id {low if low < 0 else high}, "
                f"but ids must be 0 or more{limit}; was it made with another tokenizer?"
            )


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
    if path.name.startswith(".") or path.suffix == ".db" or not path.is_file():
        return False
    return index_of(path).is_file() or ".mindrecord" in path.name


def _check_complete(path: Path, files: list[Path]) -> None:
    names = read_header(path)["shard_addresses"]
    here = {one.name for one in files if one.parent == path.parent}
    missing = sorted(set(names) - here)
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


def _check_columns(files: list[Path], columns: list[str]) -> None:
    for path in files:
        schema: dict[str, Any] = read_header(path)["schema"][0]["schema"]
        for name in columns:
            if name not in schema:
                raise UserError(
                    f"{path} has no column {name!r} (input_columns); it has {', '.join(schema)}"
                )
            if schema[name].get("type") != "int32":
                raise UserError(
                    f"{path}: column {name!r} is {schema[name].get('type')}, but must be int32"
                )


def _advice(length: int) -> str:
    return (
        f"set model.model_config.seq_length to {length - 1}, or preprocess again with the "
        "model's --seq_length (a record holds one id more: the last target)"
    )


def _mindspore_message(error: RuntimeError) -> str:
    """The one telling line of MindSpore's long messages."""
    found = re.search(r"\[ERROR\] (.+)", str(error))
    return f"cannot read the records: {found.group(1) if found else error}"
