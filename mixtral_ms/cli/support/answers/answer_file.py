"""The output file of predict: an answer is in it before anybody is shown it, and stays."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path, not_an_input, require_absent, sole_writer
from mixtral_ms.infer.engine.sampling_params import Generation
from mixtral_ms.infer.predict import answer_record
from mixtral_ms.log import get_logger

_FLAG = "--output_file"
TakeAnswer = Callable[[int, Generation], None]
"""Is given an answer and its prompt's index."""


def checked_output(name: str, *, overwrite: bool, inputs: Iterable[tuple[str, str]]) -> Path:
    """The output file, before any work is done for it.

    Args:
        name: of the file.
        overwrite: whether what is there may be replaced.
        inputs: flags, with the file or folder each names, which must not be replaced.

    Raises:
        UserError: it is an input, a folder or a device, or exists.
    """
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{_FLAG} {path}: is a folder; name a file, for example in it")
    not_an_input(path, _FLAG, inputs)
    try:
        require_absent(path, overwrite)
    except UserError as error:
        raise UserError(f"{_FLAG} {error}") from None
    return path


@contextlib.contextmanager
def answer_file(path: Path, *, overwrite: bool) -> Iterator[TakeAnswer]:
    """Yield what takes answers; each is written as JSON when those of earlier prompts are.

    Until the block succeeds they are in `<name>.partial`, and what is at `path` stays; a run that
    is ended leaves there what was answered.

    Raises:
        UserError: the file exists, another process writes it or ended while it did, or its folder
            cannot be written to.
        OSError: the disk is full; it names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    with contextlib.ExitStack() as stack:
        try:
            lock = path.with_name(f".{path.name}.lock")
            stack.enter_context(sole_writer(lock, "choose another, or wait"))
        except UserError as error:
            raise UserError(f"{_FLAG} {path}: {error}") from None
        checked_output(str(path), overwrite=overwrite, inputs=())
        if os.path.lexists(partial) and not overwrite:
            raise UserError(
                f"{_FLAG} {path}: {partial} holds answers of a run that was ended; move it away, "
                "choose another name, or add --overwrite"
            )
        partial.unlink(missing_ok=True)  # it may be a link, which must not be followed
        with open(partial, "xb", buffering=0) as file:
            lines = _Lines(file, partial)
            try:
                yield lines.take
                os.fsync(file.fileno())
                checked_output(str(path), overwrite=overwrite, inputs=())
            except BaseException:
                lines.keep()
                raise
        os.replace(partial, path)
        fsync_path(path.parent)


class _Lines:
    """Writes lines in the order of their prompts, whatever the order in which they come."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._waiting: dict[int, bytes] = {}
        self._written = 0
        self._next = 0

    def take(self, index: int, answer: Generation) -> None:
        line = json.dumps(answer_record(answer), ensure_ascii=False) + "\n"
        # Half a character becomes the escape that it has in JSON.
        self._waiting[index] = line.encode(errors="backslashreplace")
        while self._next in self._waiting:
            self._write(self._waiting[self._next])
            del self._waiting[self._next]
            self._next += 1

    def keep(self) -> None:
        """At an end before time: write also what waited for an earlier prompt, and say so."""
        with contextlib.suppress(OSError):
            for index in sorted(self._waiting):
                self._write(self._waiting[index])
        if self._written:
            get_logger().warning("ended early: %d answers are in %s", self._written, self._path)
        else:
            self._path.unlink(missing_ok=True)

    def _write(self, line: bytes) -> None:
        start, rest = self._file.tell(), memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._file.seek(start))  # whole lines only
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._written += 1
