"""Make training records from text or conversations: `mixtral-ms preprocess`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from os.path import expanduser
from typing import Any, get_args

from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, interrupted_by_signals, run_command
from mixtral_ms.cli.support.flags import true_or_false
from mixtral_ms.cli.support.preprocess_qa import ONLY_QA, add_qa_flags, run_qa
from mixtral_ms.data.documents.preprocess_documents import (
    PreprocessOptions,
    PreprocessSummary,
    preprocess,
)
from mixtral_ms.data.tokenizer.tokenizer import Backend
from mixtral_ms.errors import UserError
from mixtral_ms.printable import shell_word

_DESCRIPTION = """\
Encode text with a sentencepiece tokenizer.model and write it as a MindRecord. Documents are packed
into records with one int32 column, input_ids, of seq_length + 1 ids; conversations (qa) become
records with a second one, labels, -100 where the model has nothing to learn. Text is taken
literally: <s>, </s> and <unk> in it are characters, not control ids.
"""
_EXAMPLE = """\
examples:
  python tools/dataset_preprocess/llama_preprocess.py --dataset_type wiki \\
      --input_glob 'wikitext-2/wiki.train.tokens' --model_file tokenizer.model \\
      --seq_length 4096 --output_file wiki4096.mindrecord
  python tools/dataset_preprocess/llama_preprocess.py --dataset_type qa \\
      --input_glob alpaca-data-conversation.json --model_file tokenizer.model \\
      --seq_length 4096 --output_file alpaca-fastchat4096.mindrecord

dataset types:
  wiki        plain text: a document is what stands between blank lines. For WikiText, headings are
              left out, its spacing around punctuation and at the ends of lines is undone, and N
              becomes 1; give any other text with --clean_text False, which keeps it as it is
  wikipedia   .json, .jsonl or .parquet: a document is a row's --text_column, kept as it is; rows
              without text are listed in OUTPUT_FILE.rows.jsonl
  qa          .json, .jsonl or .parquet rows of ShareGPT (conversations), OpenAI (messages) or
              Alpaca (instruction, input, output); the answers and the eos behind them are what
              is learnt. weight or train of a message (0: read, not learnt) and a row's system are
              honoured; rows with tool calls, pictures or a history are left out. Rows that are
              left out, cut or shortened are listed in OUTPUT_FILE.rows.jsonl
"""

_ONLY_DOCUMENTS = ("repeat", "samples_num", "text_column", "add_bos", "add_eos", "clean_text")


@interrupted_by_signals()
def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    qa = arguments["dataset_type"] == "qa"
    _refuse_others_flags(parser, arguments, _ONLY_DOCUMENTS if qa else ONLY_QA)
    if qa:
        return run_qa(arguments)
    if arguments["output_file"] is None:
        raise UserError("--output_file is needed: the MindRecord to write")
    given = {one.name: arguments[one.name] for one in fields(PreprocessOptions)}
    options = PreprocessOptions(**given)
    print(_report(options, preprocess(options)))
    return 0


def _refuse_others_flags(
    parser: argparse.ArgumentParser, arguments: dict[str, Any], names: Sequence[str]
) -> None:
    """Raise UserError for a flag that the dataset type takes no notice of."""
    for name in names:
        if arguments[name] != parser.get_default(name):
            kind = arguments["dataset_type"]
            raise UserError(f"--{name} has no effect with --dataset_type {kind}; leave it out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama_preprocess.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_type", default="wiki", help="see below (default: wiki)")
    add("--input_glob", required=True, help="input file, or a quoted pattern of files")
    add("--model_file", type=expanduser, required=True, help="sentencepiece tokenizer.model")
    add("--output_file", type=expanduser, help="MindRecord to write")
    add("--seq_length", type=int, default=2048, help="the model's seq_length (default: 2048)")
    add("--file_partition", type=int, default=1, metavar="N", help="write N files (default: 1)")
    add("--repeat", type=int, default=1, metavar="N", help="read the input N times (default: 1)")
    add("--samples_num", type=int, metavar="N", help="stop after N records (default: all)")
    add("--text_column", default="text", help="column of wikipedia's rows (default: text)")
    for name, text in (
        ("--add_bos", "begin each document with bos"),
        ("--add_eos", "end each document with eos"),
        ("--clean_text", "wiki: drop headings and undo WikiText's spacing"),
    ):
        add(name, type=true_or_false, default=True, metavar="True|False", help=f"{text} (True)")
    add_qa_flags(parser)
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing output, once the new is whole",
    )
    add(
        "--tokenizer_backend",
        choices=get_args(Backend),
        default="auto",
        help="auto takes the fastest for the input's size; all give the same ids (default: auto)",
    )
    add("--tokenizer", choices=("llama",), help="accepted for MindFormers' sake: there is only one")
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _report(options: PreprocessOptions, summary: PreprocessSummary) -> str:
    if len(summary.files) == 1:
        written = data = str(summary.files[0])
    else:
        written = f"{summary.files[0]} and {len(summary.files) - 1} more"
        data = str(summary.files[0].parent)
    lines = [summary.log.report()] if summary.log.read else []
    if summary.named_rows:
        lines.append(f"named:     {summary.named_rows}")
    return (
        "\n".join(lines)
        + "\n" * bool(lines)
        + (
            f"documents: {summary.documents:,} from {summary.input_files} "
            f"file{'s' if summary.input_files > 1 else ''}"
            f"{f', read {options.repeat} times' if options.repeat > 1 else ''}\n"
            f"tokens:    {summary.tokens:,}\n"
            f"records:   {summary.records:,} of {options.seq_length + 1} ids "
            f"(seq_length {options.seq_length} + 1)\n"
            f"dropped:   {summary.dropped_tokens:,} tokens that did not make a whole record"
            f"{' or came after --samples_num' if options.samples_num else ''}\n"
            f"written:   {written}\n"
            "next:      python run_mindformer.py --config YOUR.yaml --train_data "
            f"{shell_word(data)} --set model.model_config.seq_length={options.seq_length}"
        )
    )


def command() -> int:
    """Entry point of the tool and of `python -m`."""
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
