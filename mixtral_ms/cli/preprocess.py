"""Make training records from text: `python -m mixtral_ms.cli.preprocess`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from mixtral_ms.cli.main_guard import DEBUG_FLAG, run_command
from mixtral_ms.data.preprocess import (
    DATASET_TYPES,
    PreprocessOptions,
    PreprocessSummary,
    preprocess,
)
from mixtral_ms.data.tokenizer import Backend

_DESCRIPTION = """\
Encode text with a sentencepiece tokenizer.model and pack it into a MindRecord whose records have
one int32 column, input_ids, of seq_length + 1 ids. Text is taken literally: <s>, </s> and <unk> in
it are characters, not control ids.
"""
_EXAMPLE = """\
example:
  python tools/dataset_preprocess/llama_preprocess.py --dataset_type wiki \\
      --input_glob 'wikitext-2/wiki.train.tokens' --model_file tokenizer.model \\
      --seq_length 4096 --output_file wiki4096.mindrecord

dataset types:
  wiki        plain text: a document is what stands between blank lines; WikiText's headings
              are left out and its spacing around punctuation is undone (--clean_text)
  wikipedia   .jsonl or .parquet: a document is a row's --text_column
"""


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    arguments = vars(_parser().parse_args(argv))
    options = {one.name: arguments[one.name] for one in fields(PreprocessOptions)}
    summary = preprocess(PreprocessOptions(**options))
    print(_report(PreprocessOptions(**options), summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama_preprocess.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_type", default="wiki", help=f"{' or '.join(DATASET_TYPES)} (default: wiki)")
    add("--input_glob", required=True, help="input file, or a quoted pattern of files")
    add("--model_file", required=True, help="sentencepiece tokenizer.model")
    add("--output_file", required=True, help="MindRecord to write")
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
        add(name, type=_true_or_false, default=True, metavar="True|False", help=f"{text} (True)")
    add("--overwrite", action="store_true", help="replace an existing output")
    add(
        "--tokenizer_backend",
        choices=get_args(Backend),
        default="auto",
        help="auto takes the fastest for the input's size; all give the same ids (default: auto)",
    )
    add("--tokenizer", choices=("llama",), help="accepted for MindFormers' sake: there is only one")
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _true_or_false(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _report(options: PreprocessOptions, summary: PreprocessSummary) -> str:
    if len(summary.files) == 1:
        written = data = str(summary.files[0])
    else:
        written = f"{summary.files[0]} and {len(summary.files) - 1} more"
        data = str(summary.files[0].parent)
    return (
        f"documents: {summary.documents:,} from {summary.input_files} "
        f"file{'s' if summary.input_files > 1 else ''}"
        f"{f', read {options.repeat} times' if options.repeat > 1 else ''}\n"
        f"tokens:    {summary.tokens:,}\n"
        f"records:   {summary.records:,} of {options.seq_length + 1} ids "
        f"(seq_length {options.seq_length} + 1)\n"
        f"dropped:   {summary.dropped_tokens:,} tokens that did not make a whole record"
        f"{' or came after --samples_num' if options.samples_num else ''}\n"
        f"written:   {written}\n"
        f"next:      python run_mindformer.py --config YOUR.yaml --train_data {data} "
        f"--set model.model_config.seq_length={options.seq_length}"
    )


def command() -> int:
    """Entry point of the tool and of `python -m`."""
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
