"""`complete`: prompts and their answers as framed examples, the way MixtralKit prints them."""

from collections.abc import Sequence

from mixtral_ms.cli.support.answers.predict_mode import answer_prompts
from mixtral_ms.cli.support.print_text import show
from mixtral_ms.cli.support.run_flags import (
    ANSWER_FLAGS,
    build_parser,
    load_from_args,
    looked_at,
    parse_args,
)
from mixtral_ms.infer.engine.sampling_params import Generation

_EXAMPLE = """\
example:
  python -m mixtral_ms complete --config research/mixtral_tiny/predict_mixtral-tiny.yaml \\
      --load_checkpoint output/pretrain_mixtral-tiny/checkpoint --vocab_file tokenizer.model \\
      "The import statement" "A function is"

A prompt may also be a file with one a line, JSON lines with "prompt" (.jsonl), or - for stdin.
"""
_RULE = "=" * 30


def main(argv: Sequence[str]) -> int:
    """The command; returns 1 when a prompt could not be answered. Raises UserError."""
    parser = build_parser(
        "python -m mixtral_ms complete", "Complete prompts.", _EXAMPLE, ANSWER_FLAGS
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to complete")
    args = parse_args(argv, parser)
    config = load_from_args(args)
    if looked_at(args, config):
        return 0
    given = args.prompts or config.predict_data
    return answer_prompts(config, args.config, given, "PROMPT", print_framed)


def print_framed(answers: Sequence[Generation]) -> None:
    """Each prompt and its answer between two rules."""
    for one in answers:
        response = one.text.strip("\n") if one.error is None else f"(none: {one.error})"
        show(
            f"{_RULE}Example START{_RULE}\n\n"
            f"[Prompt]:\n{one.prompt}\n\n"
            f"[Response]:\n{response}\n\n"
            f"{_RULE}Example END{_RULE}\n\n"
        )
