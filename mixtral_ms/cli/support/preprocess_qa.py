"""The part of the preprocess command that is about conversations."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from mixtral_ms.data.conversations.chat_template import DEFAULT_TEMPLATE
from mixtral_ms.data.conversations.conversation_samples import LongRows
from mixtral_ms.data.conversations.preprocess_conversations import (
    QaOptions,
    QaSummary,
    first_samples,
    preprocess_qa,
)
from mixtral_ms.data.conversations.show_sample import show_sample
from mixtral_ms.errors import UserError
from mixtral_ms.printable import shell_word

ONLY_QA = ("template", "long_rows", "packing", "pad_token_id", "show")


def add_qa_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that only `--dataset_type qa` takes."""
    add = parser.add_argument_group("only with --dataset_type qa").add_argument
    add(
        "--template",
        default=DEFAULT_TEMPLATE,
        metavar="NAME",
        help="mistral (Mixtral Instruct's own, by the version of the tokenizer) or one of fschat's "
        "conversation templates (default: vicuna)",
    )
    add(
        "--long_rows",
        choices=get_args(LongRows),
        default="cut",
        help="what to do with a row of more than seq_length + 1 ids (default: cut)",
    )
    add("--packing", action="store_true", help="several samples a record, blind to each other")
    add("--pad_token_id", type=int, metavar="ID", help="fills records up (default: unk's, 0)")
    add("--show", type=int, metavar="N", help="print N samples, the learnt part in colour")


def run_qa(arguments: Mapping[str, Any]) -> int:
    """Preprocess, or show; returns the exit status. Raises UserError for bad input."""
    show, output = arguments["show"], arguments["output_file"]
    if show is not None and show < 1:
        raise UserError(f"--show {show} must be at least 1")
    if output is None and not show:
        raise UserError("--output_file is needed: the MindRecord to write (or --show N)")
    options = QaOptions(**{one.name: arguments[one.name] for one in fields(QaOptions)})
    if show:
        _show(options, show)
    else:
        print(_report(options, preprocess_qa(options)))
    return 0


def _show(options: QaOptions, count: int) -> None:
    data, samples = first_samples(options, count)
    colour = sys.stdout.isatty()
    for number, sample in enumerate(samples, start=1):
        print(
            f"sample {number}: {len(sample.ids):,} ids, {int(sample.supervised.sum()):,} supervised"
        )
        print(show_sample(sample, data.tokenizer, colour=colour), end="\n\n")
    print(data.log.report())


def _report(options: QaOptions, summary: QaSummary) -> str:
    some = summary.files[0] if len(summary.files) == 1 else summary.files[0].parent
    filled = summary.tokens / (summary.tokens + summary.padding)
    columns = "input_ids, labels" + (", segment_ids" if options.packing else "")
    lines = [
        summary.log.report(),
        f"template:  {summary.template}; a chat with what is trained on them asks with it",
        f"tokens:    {summary.tokens:,}, of which {summary.supervised_tokens:,} supervised",
        f"records:   {summary.records:,} of {options.seq_length + 1} ids (seq_length "
        f"{options.seq_length} + 1), {filled:.1%} filled; columns {columns}",
        f"written:   {', '.join(map(str, summary.files))}",
    ]
    if summary.named_rows:
        lines.append(f"named:     {summary.named_rows}")
    lines.append(
        f"next:      python run_mindformer.py --config YOUR.yaml --run_mode finetune --train_data "
        f"{shell_word(some)} --set model.model_config.seq_length={options.seq_length}"
    )
    return "\n".join(lines)
