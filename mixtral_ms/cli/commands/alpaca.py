"""Alpaca rows to conversations: `python -m mixtral_ms alpaca`."""

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser

from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, interrupted_by_signals, run_command
from mixtral_ms.data.conversations.alpaca_converter import convert_alpaca
from mixtral_ms.printable import shell_word

_DESCRIPTION = """\
Turn rows of instruction, input and output (a JSON list, or JSON Lines) into a JSON list of
conversations, the instruction in Alpaca's prompt, for llama_preprocess.py --dataset_type qa.
"""
_EXAMPLE = """\
example:
  python tools/dataset_preprocess/alpaca_converter.py --data_path alpaca_data.json \\
      --output_path alpaca-data-conversation.json
"""


@interrupted_by_signals()
def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    arguments = _parser().parse_args(argv)
    summary = convert_alpaca(
        arguments.data_path,
        arguments.output_path,
        skip_bad_rows=arguments.skip_bad_rows,
        overwrite=arguments.overwrite,
    )
    for one in summary.bad:
        print(f"left out:  {one}")
    for one in summary.shortened:
        print(f"shortened: {one}")
    print(f"rows:      {summary.written + len(summary.bad):,} read, {len(summary.bad):,} left out")
    print(f"written:   {summary.written:,} conversations to {arguments.output_path}")
    print(
        "next:      python tools/dataset_preprocess/llama_preprocess.py --dataset_type qa "
        f"--input_glob {shell_word(arguments.output_path)} --model_file tokenizer.model "
        "--seq_length 4096 --output_file qa4096.mindrecord"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alpaca_converter.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    rows = "rows with instruction, input and output"
    add("--data_path", type=expanduser, required=True, help=rows)
    add("--output_path", type=expanduser, required=True, help="JSON file to write")
    add("--skip_bad_rows", action="store_true", help="leave out rows without instruction or output")
    add("--overwrite", action="store_true", help="replace an existing output")
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def command() -> int:
    """Entry point of the tool and of `python -m`."""
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
