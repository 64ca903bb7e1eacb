"""From text files to MindRecord: read documents, encode, pack, write; memory stays flat."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixtral_ms.data.documents.json_documents import read_wikipedia
from mixtral_ms.data.documents.token_packer import TokenPacker
from mixtral_ms.data.documents.wikitext import read_wiki
from mixtral_ms.data.mindrecord.writer import MAX_RECORD_LENGTH, RecordWriter
from mixtral_ms.data.readers.find_files import find_inputs
from mixtral_ms.data.readers.json_and_parquet import JSON_SUFFIXES, PARQUET_SUFFIXES
from mixtral_ms.data.readers.row_log import LISTING_SUFFIX, RowLog, list_named_rows
from mixtral_ms.data.readers.text_blocks import Advance, DocumentPart
from mixtral_ms.data.tokenizer.tokenizer import Backend, Tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.progress import progress_bar

# From here on the fastest tokenizer makes up for the time that it takes to load.
_BULK_BYTES = 32 << 20
_WIKITEXT_SUFFIX = ".tokens"


@dataclass
class PreprocessOptions:
    """What to preprocess and how; the fields are the command's flags."""

    input_glob: str
    model_file: str
    output_file: str
    dataset_type: str = "wiki"
    seq_length: int = 2048
    file_partition: int = 1
    repeat: int = 1
    samples_num: int | None = None
    """Stop after so many records; None means all."""
    text_column: str = "text"
    add_bos: bool = True
    add_eos: bool = True
    clean_text: bool = True
    overwrite: bool = False
    tokenizer_backend: Backend = "auto"


@dataclass
class PreprocessSummary:
    """What was read and written."""

    log: RowLog = field(default_factory=RowLog)
    """What became of the rows; without any where text is not read by the row."""
    named_rows: Path | None = None
    """Where the rows left out are listed; None when there are none."""
    files: list[Path] = field(default_factory=list)
    """The MindRecord data files."""
    input_files: int = 0
    documents: int = 0
    tokens: int = 0
    records: int = 0
    dropped_tokens: int = 0
    """Tokens encoded but not written: they did not fill a last record, or came after the limit."""


Reader = Callable[[PreprocessOptions, Path, Advance, bool, RowLog], Iterator[DocumentPart]]


def _wiki(
    options: PreprocessOptions, path: Path, advance: Advance, split_long: bool, _log: RowLog
) -> Iterator[DocumentPart]:
    if path.suffix.lower() in JSON_SUFFIXES | PARQUET_SUFFIXES:
        get_logger().warning(
            "%s is read as plain text; --dataset_type wikipedia reads a column of its rows", path
        )
    return read_wiki(path, advance, clean=options.clean_text, split_long=split_long)


def _wikipedia(
    options: PreprocessOptions, path: Path, advance: Advance, split_long: bool, log: RowLog
) -> Iterator[DocumentPart]:
    column = options.text_column
    return read_wikipedia(path, advance, text_column=column, split_long=split_long, log=log)


DATASET_TYPES: dict[str, Reader] = {"wiki": _wiki, "wikipedia": _wikipedia}
"""Dataset types by name: each reads one file's documents."""


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Encode and pack the documents of all files into records of seq_length + 1 ids.

    Raises UserError for input, model or options that cannot be used, before or while reading; then
    nothing is written.
    """
    _check(options)
    inputs = find_inputs(options.input_glob)
    total = sum(path.stat().st_size for path in inputs) * options.repeat
    tokenizer = Tokenizer(options.model_file, options.tokenizer_backend, bulk=total >= _BULK_BYTES)
    _check_special_ids(options, tokenizer)
    writer = RecordWriter(
        options.output_file,
        partitions=options.file_partition,
        overwrite=options.overwrite,
        beside=(LISTING_SUFFIX,),
    )
    writer.keep_inputs(options.model_file, inputs)
    if options.dataset_type == "wiki" and options.clean_text:
        _say_what_cleaning_changes(inputs)
    packer = TokenPacker(options.seq_length + 1)
    log = RowLog()
    summary = PreprocessSummary(log, input_files=len(inputs))
    with writer:
        listing = writer.beside(LISTING_SUFFIX)
        bar = progress_bar(total, "preprocess", "B", scale=True)
        with list_named_rows(listing, log), bar as shown:
            parts = _all_parts(options, inputs, shown, tokenizer.splits_at_spaces, log)
            with closing(parts):
                _encode_and_write(options, tokenizer, packer, writer, parts, summary)
        if not writer.records:
            raise _too_little(options, inputs, packer.tokens)
    summary.named_rows = writer.path.with_name(listing.name) if log.named else None
    summary.files = writer.files
    summary.tokens = packer.tokens
    summary.records = writer.records
    summary.dropped_tokens = packer.tokens - writer.records * packer.record_length
    return summary


def _say_what_cleaning_changes(inputs: list[Path]) -> None:
    others = [one for one in inputs if one.suffix != _WIKITEXT_SUFFIX]
    if others:
        get_logger().warning(
            "%s is cleaned as if it were WikiText's: lines like = Title = are left out, spaces "
            "around punctuation, in brackets and at the ends of lines go, and a lone N becomes 1; "
            "--clean_text False keeps text as it is",
            others[0] if len(others) == 1 else f"the text of {len(others)} files",
        )


def _encode_and_write(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    packer: TokenPacker,
    writer: RecordWriter,
    parts: Iterator[DocumentPart],
    summary: PreprocessSummary,
) -> None:
    """Run the documents through; fills the packer, the writer and the count of documents."""
    before = np.array([tokenizer.bos_id] * options.add_bos, np.int32)
    after = np.array([tokenizer.eos_id] * options.add_eos, np.int32)
    nothing = np.empty(0, np.int32)
    batch = writer.batch_records(packer.record_length)
    limit = options.samples_num

    def room() -> int | None:
        return None if limit is None else limit - writer.records

    for text, starts, ends in parts:
        summary.documents += starts
        ids = tokenizer.encode_array(text)
        packer.add(before if starts else nothing, ids, after if ends else nothing)
        left = room()
        if packer.ready >= batch or (left is not None and packer.ready >= left):
            writer.write(input_ids=packer.take(left))
            if limit is not None and writer.records >= limit:
                return
    writer.write(input_ids=packer.take(room()))


def _all_parts(
    options: PreprocessOptions, inputs: list[Path], bar: tqdm, split_long: bool, log: RowLog
) -> Generator[DocumentPart, None, None]:
    reader = DATASET_TYPES[options.dataset_type]
    for time in range(options.repeat):
        for path in inputs:  # a row is counted once however often it is read
            yield from reader(options, path, bar.update, split_long, RowLog() if time else log)


def _check(options: PreprocessOptions) -> None:
    if options.dataset_type not in DATASET_TYPES:
        raise UserError(
            f"--dataset_type {options.dataset_type!r} is not available; "
            f"choose one of: {', '.join(sorted(DATASET_TYPES))}"
        )
    if not 1 <= options.seq_length < MAX_RECORD_LENGTH:
        raise UserError(
            f"--seq_length {options.seq_length} is not between 1 and {MAX_RECORD_LENGTH - 1}"
        )
    for name in ("repeat", "file_partition", "samples_num"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")


def _check_special_ids(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    for flag, wanted, one in (
        ("--add_bos", options.add_bos, tokenizer.bos_id),
        ("--add_eos", options.add_eos, tokenizer.eos_id),
    ):
        if wanted and one < 0:
            raise UserError(f"{options.model_file} has no such id; give {flag} False")


def _too_little(options: PreprocessOptions, inputs: list[Path], tokens: int) -> UserError:
    what = f"{len(inputs)} file{'s' if len(inputs) > 1 else ''} of {options.input_glob!r}"
    if not tokens:
        return UserError(f"no text found in {what}")
    return UserError(
        f"{what} hold {tokens} tokens, fewer than one record of seq_length + 1 = "
        f"{options.seq_length + 1}; give more text, a smaller --seq_length or --repeat"
    )
