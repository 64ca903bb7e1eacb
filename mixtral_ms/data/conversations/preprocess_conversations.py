"""From conversations to a MindRecord for fine-tuning.

A record has int32 `input_ids` and `labels` of seq_length + 1 ids each, a supervised id standing in
`labels` at its own position and -100 elsewhere. This is what MindFormers writes and reads: its
network drops the last input and the first label when it trains, and so does our loader. Packed
records have `segment_ids` too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY
from mixtral_ms.data.conversations.conversation_samples import ConversationOptions, Conversations
from mixtral_ms.data.conversations.sample_encoder import Sample
from mixtral_ms.data.conversations.sample_packing import Record, lay_out
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.data.readers.find_files import find_inputs
from mixtral_ms.data.readers.row_log import LISTING_SUFFIX, RowLog, list_named_rows
from mixtral_ms.errors import UserError
from mixtral_ms.progress import progress_bar


@dataclass
class QaOptions(ConversationOptions):
    """What to preprocess and how; the fields are the command's flags."""

    input_glob: str = ""
    output_file: str = ""
    file_partition: int = 1
    overwrite: bool = False


@dataclass
class QaSummary:
    """What was read and written."""

    log: RowLog
    template: str
    """The chat template's name."""
    files: list[Path] = field(default_factory=list)
    """The MindRecord data files."""
    named_rows: Path | None = None
    """Where the rows left out, cut or shortened are listed; None when there are none."""
    input_files: int = 0
    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    padding: int = 0


def preprocess_qa(options: QaOptions) -> QaSummary:
    """Encode the conversations of all files and write them; memory stays flat.

    Raises UserError for input, model or options that cannot be used; then nothing is written.
    """
    inputs = find_inputs(options.input_glob)
    if not options.file_partition >= 1:
        raise UserError(f"--file_partition {options.file_partition} must be at least 1")
    columns = ("input_ids", "labels", *["segment_ids"] * options.packing)
    log = RowLog()
    data = Conversations(inputs, options, log)
    writer = RecordWriter(
        options.output_file,
        columns,
        facts={CHAT_TEMPLATE_KEY: data.encoder.record},
        partitions=options.file_partition,
        overwrite=options.overwrite,
        beside=(LISTING_SUFFIX,),
    )
    writer.keep_inputs(options.model_file, inputs)
    summary = QaSummary(log, template=data.encoder.name, input_files=len(inputs))
    with writer:
        listing = writer.beside(LISTING_SUFFIX)
        bar = progress_bar(data.total_bytes, "preprocess", "B", scale=True)
        with list_named_rows(listing, log), bar as shown:
            _write(data, data.records(shown.update), writer, summary)
        if not writer.records:
            raise log.nothing_usable(repr(options.input_glob))
    summary.files, summary.records = writer.files, writer.records
    summary.named_rows = writer.path.with_name(listing.name) if log.named else None
    return summary


def first_samples(options: QaOptions, count: int) -> tuple[Conversations, list[Sample]]:
    """The first so many samples, without writing anything; reads no further than needed."""
    log = RowLog()
    data = Conversations(find_inputs(options.input_glob), options, log)
    samples = list(islice(data.samples(lambda _: None), count))
    if not samples:
        raise log.nothing_usable(repr(options.input_glob))
    return data, samples


def _write(
    data: Conversations, records: Iterator[Record], writer: RecordWriter, summary: QaSummary
) -> None:
    batch = writer.batch_records(data.record_length)
    while some := list(islice(records, batch)):
        columns = lay_out(some, data.record_length, data.pad_id, packed=data.options.packing)
        writer.write(**columns)
        tokens = sum(len(sample.ids) for record in some for sample in record)
        summary.tokens += tokens
        supervised = sum(int(one.supervised.sum()) for record in some for one in record)
        summary.supervised_tokens += supervised
        summary.padding += len(some) * data.record_length - tokens
