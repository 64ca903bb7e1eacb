"""From files of conversations to records of samples, each row of the files accounted for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mixtral_ms.data.conversations.chat_template import DEFAULT_TEMPLATE
from mixtral_ms.data.conversations.conversation_encoder import conversation_encoder
from mixtral_ms.data.conversations.parse_conversation import read_conversation
from mixtral_ms.data.conversations.sample_encoder import Sample
from mixtral_ms.data.conversations.sample_packing import Record, one_a_record, pack
from mixtral_ms.data.mindrecord.writer import MAX_RECORD_LENGTH
from mixtral_ms.data.readers.json_and_parquet import read_rows
from mixtral_ms.data.readers.row_log import RowLog, UnfitRowError
from mixtral_ms.data.readers.text_blocks import Advance
from mixtral_ms.data.tokenizer.tokenizer import Backend, Tokenizer
from mixtral_ms.errors import UserError

LongRows = Literal["cut", "drop", "error"]

# From here on the fastest tokenizer makes up for the time that it takes to load.
_BULK_BYTES = 4 << 20


@dataclass
class ConversationOptions:
    """What conversations become; the fields are flags of the command and keys of the YAML."""

    model_file: str
    seq_length: int = 2048
    template: str = DEFAULT_TEMPLATE
    long_rows: LongRows = "cut"
    """What to do with a row of more than seq_length + 1 ids."""
    packing: bool = False
    """Several samples a record, kept apart by segment_ids."""
    pad_token_id: int | None = None
    """Fills records up; None takes the tokenizer's, or the unknown piece's where it has none."""
    tokenizer_backend: Backend = "auto"


class Conversations:
    """The samples of some files.

    Args:
        inputs: JSON, JSON Lines or Parquet files of ShareGPT, OpenAI or Alpaca rows.
        options: what they become.
        log: told of each row.

    Raises UserError for options, a tokenizer or a template that cannot be used.
    """

    def __init__(self, inputs: Sequence[Path], options: ConversationOptions, log: RowLog) -> None:
        _check(options)
        self.inputs, self.options, self.log = inputs, options, log
        self.total_bytes = sum(path.stat().st_size for path in inputs)
        self.tokenizer = Tokenizer(
            options.model_file, options.tokenizer_backend, bulk=self.total_bytes >= _BULK_BYTES
        )
        self.record_length = options.seq_length + 1
        self.pad_id = self._pad_id()
        self.encoder = conversation_encoder(self.tokenizer, options.template)

    def records(self, advance: Advance) -> Iterator[Record]:
        """Samples that share a record, together at most seq_length + 1 ids."""
        samples = self.samples(advance)
        return pack(samples, self.record_length) if self.options.packing else one_a_record(samples)

    def samples(self, advance: Advance) -> Iterator[Sample]:
        """One sample for each usable row, of at most seq_length + 1 ids and something supervised.

        Raises UserError for a file that cannot be read, and for a long row with long_rows "error".
        """
        for path in self.inputs:
            for row in read_rows(path, advance):
                self.log.read += 1
                try:
                    sample = self._sample(path, row.number, row.value)
                except UnfitRowError as error:
                    self.log.add(path, row.number, "left out", str(error))
                else:
                    yield sample

    def _sample(self, path: Path, number: int, row: object) -> Sample:
        conversation = read_conversation(row)
        sample = self.encoder(conversation)
        count = len(sample.ids)
        if count > self.record_length:
            what = f"{count} ids, seq_length + 1 is {self.record_length}"
            sample = self._shorter(path, number, sample, what)
            reason = "; ".join(filter(None, (what, conversation.shortened)))
            self.log.add(path, number, "cut", reason)
        elif conversation.shortened:
            self.log.add(path, number, "shortened", conversation.shortened)
        return sample

    def _shorter(self, path: Path, number: int, sample: Sample, what: str) -> Sample:
        """The part of a long sample that fits."""
        if self.options.long_rows == "error":
            raise UserError(
                f"row {number} of {path} is too long: {what}; "
                "give a larger --seq_length, or --long_rows (data_loader.long_rows) cut or drop"
            )
        if self.options.long_rows == "drop":
            raise UnfitRowError(f"too long: {what}")
        cut = Sample(*(part[: self.record_length] for part in sample))
        if not cut.supervised.any():
            raise UnfitRowError(f"too long, and no answer begins within it: {what}")
        return cut

    def _pad_id(self) -> int:
        """The padding id. Raises UserError for one that already means something."""
        tokenizer, given = self.tokenizer, self.options.pad_token_id
        if given is None:
            given = tokenizer.pad_id if tokenizer.pad_id >= 0 else tokenizer.unk_id
        if not 0 <= given < tokenizer.vocab_size or given in (tokenizer.bos_id, tokenizer.eos_id):
            raise UserError(
                f"--pad_token_id (model_config.pad_token_id) {given} must be below "
                f"{tokenizer.vocab_size} and neither bos ({tokenizer.bos_id}) nor eos "
                f"({tokenizer.eos_id}): answers have to end with eos"
            )
        return given


def _check(options: ConversationOptions) -> None:
    if options.long_rows not in get_args(LongRows):
        raise UserError(f"--long_rows {options.long_rows!r} is not one of {get_args(LongRows)}")
    if not 1 <= options.seq_length < MAX_RECORD_LENGTH:
        raise UserError(
            f"--seq_length {options.seq_length} is not between 1 and {MAX_RECORD_LENGTH - 1}"
        )
