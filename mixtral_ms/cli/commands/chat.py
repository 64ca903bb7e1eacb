"""`chat`: talk to an instruction-tuned model, in a terminal or through a pipe."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from mixtral_ms.cli.support.chat_commands import HELP, run_chat_command
from mixtral_ms.cli.support.chat_session import ChatSession
from mixtral_ms.cli.support.print_text import show
from mixtral_ms.cli.support.run_flags import (
    ANSWER_FLAGS,
    build_parser,
    load_from_args,
    looked_at,
    parse_args,
)
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.printable import printable_block
from mixtral_ms.train.trainer import Trainer

_EXAMPLE = f"""\
example:
  python -m mixtral_ms chat --config research/mixtral_8x7b/predict_mixtral-8x7b.yaml \\
      --device_target CPU --use_parallel False --load_checkpoint Mixtral-8x7B-Instruct-v0.1 \\
      --weight_dtype int8 --do_sample True

In the chat:
{HELP}
"""
_OF_FILES = {"predict_batch_size", "logprobs", "output_file", "overwrite"}
_QUESTION = "you> "
_ESCAPED = "//"


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    parser = build_parser(
        "python -m mixtral_ms chat",
        "Chat with a model, with the template that it was trained with.",
        _EXAMPLE,
        [one for one in ANSWER_FLAGS if one.attribute not in _OF_FILES],
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="mistral (Mixtral Instruct's own) or one of fschat's (default: the one recorded with "
        "the weights, else mistral)",
    )
    args = parse_args(argv, parser)
    config = load_from_args(args)
    if looked_at(args, config):
        return 0
    config.run_mode = "predict"
    model = Trainer(config).model
    session = ChatSession(model, args.template)
    source = "--template" if args.template else model.template_source
    get_logger().info("chat template %s (%s)", session.history.template, source)
    if sys.stdin.isatty():
        print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    _talk(session)
    return 0


def _talk(session: ChatSession) -> None:
    """Read and answer until the input ends, /exit, or Ctrl-C when nothing is answered."""
    interrupted = False
    while True:
        try:
            line = _read_line()
        except EOFError:
            break
        except KeyboardInterrupt:
            if interrupted:
                break
            interrupted = True
            print("\n(Ctrl-C again, or Ctrl-D, leaves)")
            continue
        interrupted = False
        try:
            if line.startswith("/") and not line.startswith(_ESCAPED):
                if not run_chat_command(session, line):
                    return
            elif line.strip():
                interrupted = _answer(session, line.removeprefix("/"))
        except UserError as error:
            print(f"error: {printable_block(error)}", flush=True)
        except KeyboardInterrupt:  # the second one within an answer
            break
    if sys.stdin.isatty():
        print()


def _read_line() -> str:
    """A line of input. Raises EOFError at its end, UserError for what is no text."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - its import gives input() editing and recall
        return input(_QUESTION)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 text: {error}") from None
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def _answer(session: ChatSession, question: str) -> bool:
    """Stream the answer; returns whether Ctrl-C stopped it."""
    with _interruptible() as interrupted:
        for piece in session.ask(question, interrupted.__len__):
            show(piece)
    show("\n")
    for note in session.notes:
        print(f"({note})", flush=True)
    return bool(interrupted)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list that a first Ctrl-C fills; the second raises KeyboardInterrupt.

    An exception in the midst of an engine's step would leave a request half done.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)
