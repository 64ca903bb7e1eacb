"""How every command ends: exit status and what the user sees of an error."""

import sys
import traceback
from collections.abc import Callable, Sequence

from mixtral_ms.errors import UserError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

DEBUG_FLAG = "--debug"


def run_command(function: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command on its arguments and return its exit status.

    A UserError prints its message and gives 2, Ctrl-C 130, anything else one line and 1. With
    `--debug` among the arguments the traceback is printed first.

    Args:
        function: the command; returns an exit status, or None for 0.
        argv: the arguments without the program's name.
    """
    try:
        return function(argv) or EXIT_OK
    except UserError as error:
        _print_traceback(argv)
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _print_traceback(argv)
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last guard before the user
        debug = _print_traceback(argv)
        hint = "" if debug else f" (add {DEBUG_FLAG} for the traceback)"
        print(f"failed: {type(error).__name__}: {_one_line(error)}{hint}", file=sys.stderr)
        return EXIT_FAILURE


def _print_traceback(argv: Sequence[str]) -> bool:
    debug = DEBUG_FLAG in argv
    if debug:
        traceback.print_exc()
    return debug


def _one_line(error: Exception) -> str:
    """The message's first line that says something; native errors bring banners and stacks."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line.startswith("[ERROR]")] or [
        line for line in lines if line.strip("- ")
    ]
    return telling[0] if telling else "no message"
