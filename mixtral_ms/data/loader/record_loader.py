"""Batches of training records, in an order that can be resumed.

Legend: B batch, S sequence, V vocabulary.
"""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np

from mixtral_ms.config.sections.data_section import DatasetSection
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY, template_of_record
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.data.loader.conversation_records import ConversationRecords
from mixtral_ms.data.mindrecord.reader import MindRecords, Records
from mixtral_ms.errors import UserError

_NO_RECORD = -1


class RecordLoader:
    """Reads records of seq_length + 1 ids as batches (inputs ids[:-1], labels ids[1:]).

    The order is a pure function of (seed, epoch). Batch i is made of the records at i*B*world to
    (i+1)*B*world - 1 of that order, of which rank r takes the r-th B. So what a step sees does not
    depend on how many ranks share it, rank r's batch i is batch i*world + r of one process, and
    `batches(epoch, start_batch)` continues exactly where a run stopped.

    Args:
        section: `train_dataset` or `eval_dataset`; `data_loader.dataset_dir` is a MindRecord file,
            a partitioned one, or a folder of them (for a ConversationDataset, files of
            conversations); `data_loader.num_samples` limits the records to the first so many.
        seq_length: ids of an input.
        batch_size: sequences of a batch of one rank, each a record.
        seed: orders the records, together with the epoch.
        shuffle: False keeps the records' own order.
        ignore_token_id: label that means "no target".
        pad_token_id: labels with this id become ignore_token_id; negative: there is no padding.
        rank: this process among those that share the data.
        world: how many processes share the data.
        part: which part of the sequence this process has.
        parts: into how many parts each sequence is cut.
        vocab_size: ids must be below it; None skips the check.
        tokenizer_file: the tokenizer.model, which a ConversationDataset needs.
        keep_partial: the last batch may hold fewer records (evaluation); otherwise they are left
            out. With several ranks all get equally many, filled up with ones without any target.

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
        part: int = 0,
        parts: int = 1,
        vocab_size: int | None = None,
        tokenizer_file: str | None = None,
        keep_partial: bool = False,
    ) -> None:
        self.data: Records = (
            MindRecords(section.data_loader.dataset_dir, section.input_columns)
            if section.data_loader.type == "MindDataset"
            else ConversationRecords(section.data_loader, seq_length, tokenizer_file, pad_token_id)
        )
        if CHAT_TEMPLATE_KEY in self.data.facts:
            where = f"{section.data_loader.dataset_dir}: {CHAT_TEMPLATE_KEY!r} in the header"
            template_of_record(self.data.facts[CHAT_TEMPLATE_KEY], where)
        self.seq_length = seq_length
        self.batch_size = batch_size
        self._seed, self._shuffle = seed, shuffle
        self._ignore, self._pad = ignore_token_id, pad_token_id
        self._rank, self._world = rank, world
        self._part, self._parts = part, parts
        self._vocab_size = vocab_size
        self._keep_partial = keep_partial
        limit = section.data_loader.num_samples
        self.records = min(len(self.data), limit) if limit else len(self.data)
        if not len(self):
            raise UserError(
                f"{section.data_loader.dataset_dir} has {self.records} records, fewer than one "
                f"batch of {batch_size} on each of {world} ranks: give more data, or lower "
                "runner_config.batch_size"
            )
        for number, record in zip(self._ends, self.data.read(self._ends), strict=True):
            self._check_record(record, number)

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.records, self.batch_size * self._world)
        return whole + bool(rest and self._keep_partial)

    @property
    def fingerprint(self) -> str:
        """Short hash of the data: its identity, how much of it, and the first and last record.

        It does not change when the files are moved.
        """
        digest = hashlib.sha256()
        facts = (self.data.identity, len(self.data), self.records, self.data.columns)
        digest.update(repr(facts).encode())
        for record in self.data.read(self._ends):
            for column in record:
                digest.update(column.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def batches(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from `start_batch` on, for this rank."""
        order = self._order(epoch)
        shares = [self._share(order, batch) for batch in range(start_batch, len(self))]
        if not shares:
            return
        records = self.data.read([one for share in shares for one in share if one != _NO_RECORD])
        with closing(records):
            for share in shares:
                yield self._batch(share, records).columns(self._part, self._parts)

    @property
    def _ends(self) -> list[int]:
        """The first and the last record; none may be read twice."""
        return sorted({0, self.records - 1})

    def _order(self, epoch: int) -> np.ndarray:
        """Record numbers in the order of an epoch."""
        if not self._shuffle:
            return np.arange(self.records)
        # RandomState's stream is frozen for good, so that a resumed run may use another NumPy.
        bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(bits).permutation(self.records)

    def _share(self, order: np.ndarray, batch: int) -> list[int]:
        """Numbers of this rank's records in a global batch, as many as the other ranks have."""
        size = self.batch_size * self._world
        everyone = order[batch * size : (batch + 1) * size]
        each = -(-len(everyone) // self._world)
        mine = everyone[self._rank * each : (self._rank + 1) * each].tolist()
        return mine + [_NO_RECORD] * (each - len(mine))

    def _batch(self, share: list[int], records: Iterator[list[np.ndarray]]) -> Batch:
        shape = (len(share), self.seq_length)
        inputs_BS = np.zeros(shape, np.int32)
        labels_BS = np.full(shape, self._ignore, np.int32)
        segments_BS = np.zeros(shape, np.int32) if "segment_ids" in self.data.columns else None
        for index, number in enumerate(share):
            if number != _NO_RECORD:
                record = next(records)
                self._check_record(record, number)
                columns = dict(zip(self.data.columns, record, strict=True))
                inputs_BS[index] = columns["input_ids"][:-1]
                labels_BS[index] = columns.get("labels", columns["input_ids"])[1:]
                if segments_BS is not None:
                    segments_BS[index] = columns["segment_ids"][:-1]
        if self._pad >= 0:
            labels_BS[labels_BS == self._pad] = self._ignore
        return Batch(inputs_BS, labels_BS, segments_BS)

    def _check_record(self, record: list[np.ndarray], number: int) -> None:
        """Raise UserError, with the record's number and file, unless it fits the model."""
        wanted = self.seq_length + 1
        for name, ids in zip(self.data.columns, record, strict=True):
            if len(ids) != wanted:
                raise UserError(
                    f"{self.data.name_of(number)} has {len(ids)} {name}, but "
                    f"seq_length {self.seq_length} needs records of {wanted}: {_advice(len(ids))}"
                )
        columns = dict(zip(self.data.columns, record, strict=True))
        self._check_ids(columns["input_ids"], "id", number)
        if "labels" in columns:
            labels = columns["labels"]
            self._check_ids(labels[labels != self._ignore], "label", number)
        if "segment_ids" in columns and not _are_segments(columns["segment_ids"]):
            raise UserError(
                f"{self.data.name_of(number)} has segment_ids that are negative or that come "
                "again after others: each packed sample has a number of its own, padding 0"
            )

    def _check_ids(self, ids: np.ndarray, what: str, number: int) -> None:
        """Raise UserError unless all are in the vocabulary."""
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low >= 0 and (self._vocab_size is None or high < self._vocab_size):
            return
        limit = "" if self._vocab_size is None else f" and below vocab_size {self._vocab_size}"
        ignored = "" if what == "id" else f", or ignore_token_id {self._ignore}"
        raise UserError(
            f"{self.data.name_of(number)} has the {what} {low if low < 0 else high}, "
            f"but {what}s must be 0 or more{limit}{ignored}; was it made with another tokenizer?"
        )


def _are_segments(ids: np.ndarray) -> bool:
    """Whether each number stands in one run only, and none is negative."""
    runs = ids[np.append(True, ids[1:] != ids[:-1])]
    return int(runs.min()) >= 0 and len(np.unique(runs)) == len(runs)


def _advice(length: int) -> str:
    return (
        f"set model.model_config.seq_length to {length - 1}, or preprocess again with the "
        "model's --seq_length (a record holds one id more: the last target)"
    )
