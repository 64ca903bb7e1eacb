"""How every command ends: exit status and what the user sees of an error."""

import contextlib
import errno
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from mixtral_ms.cli.support.standard_streams import lasting_streams
from mixtral_ms.errors import UserError
from mixtral_ms.files import asked_path
from mixtral_ms.printable import printable, printable_block

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
_EXIT_SIGNAL = 128
EXIT_INTERRUPTED = _EXIT_SIGNAL + signal.SIGINT

DEBUG_FLAG = "--debug"
# What the system says of a path that was given wrongly; of others (a full disk) it is to blame.
_WRONG_PATH = {
    *(errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.EROFS),
}


def run_command(function: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command on its arguments and return its exit status.

    A UserError prints its message and gives 2, as a path does that the system refuses; Ctrl-C 130
    (`interrupted_by_signals` adds others), anything else one line and 1. With `--debug` among the
    arguments the traceback is printed first.

    Args:
        function: the command; returns an exit status, or None for 0.
        argv: the arguments without the program's name.
    """
    with lasting_streams():
        try:
            status = function(argv) or EXIT_OK
            sys.stdout.flush()  # while a full disk can still be told
        except UserError as error:
            _print_traceback(argv)
            print(f"error: {printable_block(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt as error:
            return _interrupted(error, argv)
        except Exception as error:  # noqa: BLE001 - the last guard before the user
            if (interrupt := _interrupt_behind(error)) is not None:
                return _interrupted(interrupt, argv)
            return _failed(error, debug=_print_traceback(argv))
        return status


class SignalInterrupt(KeyboardInterrupt):
    """A signal that ends the process as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Make SIGTERM (a scheduler's) and SIGHUP (a lost connection's) end the block as Ctrl-C does.

    So what is half written is removed, which the next process would otherwise have to do. What
    nohup has set stays; the exit status is the one that the signal gives.
    """

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        raise SignalInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(error: KeyboardInterrupt, argv: Sequence[str]) -> int:
    _print_traceback(argv)
    by = f" by {error}" if isinstance(error, SignalInterrupt) else ""
    print(f"interrupted{by}", file=sys.stderr)
    return _EXIT_SIGNAL + error.number if isinstance(error, SignalInterrupt) else EXIT_INTERRUPTED


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that native code made an error of its own of: within an import it does."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _failed(error: Exception, *, debug: bool) -> int:
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        # Of a rename, what it was to become is what the user asked for.
        path = asked_path(error.filename2 or error.filename)
        wrong = error.errno in _WRONG_PATH
        line = f"{'error' if wrong else 'failed'}: {printable(path)}: {error.strerror}"
        print(line, file=sys.stderr)
        return EXIT_BAD_INPUT if wrong else EXIT_FAILURE
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
    return printable(telling[0]) if telling else "no message"
