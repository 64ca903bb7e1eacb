"""Standard streams that outlast their reader: no closed or narrow terminal costs a result."""

import contextlib
import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from mixtral_ms.printable import for_terminal

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDOUT, _STDERR = 1, 2
_NAMES = {_STDOUT: "standard output", _STDERR: "standard error"}


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard output and error as a command may use them without a thought, until the block ends.

    When nobody reads any more (`| head`, a closed window), what is still written is dropped and the
    command goes on. A character that the encoding does not have is written as an escape, and so is
    what would act on a terminal. A stream that was closed from the start is /dev/null. A full disk
    is an OSError that names the stream.
    """
    _open_missing()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - outlives the block
    sys.stdout, sys.stderr = _lasting(sys.stdout, _STDOUT), _lasting(sys.stderr, _STDERR)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Without this, the next file that is opened would be standard output to native code."""
    for descriptor in range(_STDERR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            # opens as the lowest free number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        if not isinstance(stream, io.TextIOWrapper):
            return stream  # a notebook's
        try:
            descriptor, encoding = stream.fileno(), stream.encoding
        except (OSError, ValueError):
            return stream  # a test's
        stream.flush()
    terminal = os.isatty(descriptor)
    return (_Terminal if terminal else io.TextIOWrapper)(
        io.BufferedWriter(_LastingFile(descriptor)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=terminal or descriptor == _STDERR,
    )


class _LastingFile(io.FileIO):
    """A descriptor that takes everything, whether somebody reads it or not."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        # A terminal that is gone answers with EIO; of a file that is the disk's fault.
        device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        self._reader_gone = {errno.EPIPE, errno.EIO} if device else {errno.EPIPE}

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write, or drop what nobody reads; wait where a pipe that does not block is full."""
        while True:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                if error.errno in self._reader_gone:
                    return memoryview(data).nbytes
                name = _NAMES.get(self.fileno(), "a standard stream")
                raise OSError(error.errno, error.strerror, name) from None
            if written is not None:
                return written
            select.select([], [self.fileno()], [])


class _Terminal(io.TextIOWrapper):
    """Shows what would act on the terminal as an escape."""

    def write(self, text: str, /) -> int:
        """Write it, and give its length."""
        super().write(for_terminal(text))
        return len(text)
