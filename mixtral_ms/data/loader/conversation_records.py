"""Files of conversations as records, without a MindRecord between: tokenized when a run starts."""

import hashlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.config.sections.data_section import DataLoaderSection
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY
from mixtral_ms.data.conversations.conversation_samples import ConversationOptions, Conversations
from mixtral_ms.data.conversations.sample_packing import lay_out
from mixtral_ms.data.readers.find_files import files_in_folder
from mixtral_ms.data.readers.json_and_parquet import JSON_SUFFIXES, PARQUET_SUFFIXES
from mixtral_ms.data.readers.row_log import RowLog
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.log import get_logger
from mixtral_ms.progress import progress_bar


class ConversationRecords:
    """The records that llama_preprocess.py --dataset_type qa would write, kept in memory.

    They take five bytes a token; padding is added as they are read.

    Args:
        section: `data_loader`, whose dataset_dir is a file or a folder of files.
        seq_length: ids of an input; a record has one more.
        tokenizer_file: the tokenizer.model.
        pad_token_id: fills records up.

    Raises UserError for files, a tokenizer or a template that cannot be used, and when no row can.
    """

    def __init__(
        self,
        section: DataLoaderSection,
        seq_length: int,
        tokenizer_file: str | None,
        pad_token_id: int,
    ) -> None:
        if not tokenizer_file:
            raise UserError(
                "a ConversationDataset needs processor.tokenizer.vocab_file: the tokenizer.model"
            )
        if pad_token_id < 0:
            raise UserError(
                f"model.model_config.pad_token_id {pad_token_id} says that nothing is padded, but "
                "conversations are: set it to the tokenizer's padding id, or its unknown one (0)"
            )
        options = ConversationOptions(
            model_file=tokenizer_file,
            seq_length=seq_length,
            template=section.template,
            long_rows=section.long_rows,
            packing=section.packing,
            pad_token_id=pad_token_id,
        )
        self._where = section.dataset_dir
        self.columns = ["input_ids", "labels", *["segment_ids"] * section.packing]
        log = RowLog()
        self._data = Conversations(find_conversations(section.dataset_dir), options, log)
        self.facts: Mapping[str, Any] = {CHAT_TEMPLATE_KEY: self._data.encoder.record}
        with progress_bar(self._data.total_bytes, "tokenizing", "B", scale=True) as bar:
            self._records = list(self._data.records(bar.update))
        self._report(log)
        self.identity = self._digest()

    @property
    def files(self) -> list[Path]:
        """The files that were read."""
        return list(self._data.inputs)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def read(self, records: list[int]) -> Generator[list[np.ndarray], None, None]:
        """The columns of some records, in the order asked for."""
        data = self._data
        for record in records:
            columns = lay_out(
                [self._records[record]],
                data.record_length,
                data.pad_id,
                packed=data.options.packing,
            )
            yield [columns[name][0] for name in self.columns]

    def name_of(self, record: int) -> str:
        """What to call a record in messages."""
        return f"record {record} of {self._where}"

    def _report(self, log: RowLog) -> None:
        if not self._records:
            raise log.nothing_usable(self._where)
        for line in log.report().splitlines():
            get_logger().info("%s", line)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for record in self._records:
            for sample in record:
                digest.update(sample.ids.astype("<i4").tobytes())
                digest.update(sample.supervised.tobytes())
            digest.update(b"|")
        return digest.hexdigest()


def find_conversations(path: str) -> list[Path]:
    """Files behind a path: itself, or the JSON and Parquet files in a folder, sorted by name.

    Raises UserError when there is none.
    """
    if not path:
        raise UserError("no data: give --train_data, or data_loader.dataset_dir in the YAML")
    source = Path(path)
    if not source.is_dir():
        require_file(source)
        return [source]
    known = JSON_SUFFIXES | PARQUET_SUFFIXES
    files = files_in_folder(source, known)
    if not files:
        raise UserError(f"no conversations in {path}: it has no {', '.join(sorted(known))} files")
    return files
