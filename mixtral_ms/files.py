"""Files that are whole or absent: written aside, flushed to disk, renamed; by one process."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixtral_ms.errors import BusyError, UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.log import get_logger

_HASH_CHUNK = 1 << 22
_MOST_ATTEMPTS = 100
_ASIDE = re.compile(r"\.(.+)\.(?:[0-9a-f]{8}\.tmp|converting|writing)")
# The system names no file with these, and nothing but writing gives them.
_WRITE_ERRORS = {errno.EDQUOT, errno.EFBIG, errno.ENOSPC}


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    A reader never sees half a file, and a failure leaves what was at `path` untouched. A full disk
    is an OSError that names `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _naming(target):
            yield aside
            fsync_path(aside)
        os.replace(aside, target)
        fsync_path(target.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let a full disk's error name the file that was being written: the system does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _WRITE_ERRORS:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def not_an_input(output: Path, flag: str, inputs: Iterable[tuple[str, str]]) -> None:
    """Raise UserError when an output would replace what the work is made from.

    Args:
        output: the file that will be written.
        flag: that names it.
        inputs: flags, with what each was given: files and folders, or a text that is neither.
    """
    for name, given in inputs:
        if given and output.exists() and _is_or_holds(given, output):
            raise UserError(f"{flag} {output}: is read too ({name} {given}); choose another")


def _is_or_holds(given: str, path: Path) -> bool:
    try:
        real = path.resolve()
        return any(os.path.samefile(given, one) for one in (real, *real.parents))
    except (OSError, ValueError):  # a text, or not there
        return False


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden path beside a command's output; rename it to that when the block succeeds.

    No other process writes the same output meanwhile, and what a killed one left is replaced.

    Raises UserError for an output that is there, before the block or after it, unless `overwrite`,
    and when another process is writing it; for a full disk an OSError that names `path`.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.writing")
    with sole_writer(target.with_name(f".{target.name}.lock"), f"{target}: wait for its writer"):
        require_absent(target, overwrite)
        aside.unlink(missing_ok=True)
        try:
            with _naming(target):
                yield aside
                fsync_path(aside)
            require_absent(target, overwrite)
            os.replace(aside, target)
            fsync_path(target.parent)
        finally:
            aside.unlink(missing_ok=True)


def require_absent(path: Path, overwrite: bool) -> None:
    """Raise UserError for an output that is there, unless it is a file that may be replaced."""
    if not os.path.lexists(path):
        return
    require_file(path)
    if not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another name")


def asked_path(path: str | bytes) -> str:
    """The path that was asked for, of one at which its file or folder is written aside."""
    parts = Path(os.fsdecode(path)).parts
    for index, part in enumerate(parts):
        if aside := _ASIDE.fullmatch(part):
            return str(Path(*parts[:index], aside[1]))
    return os.fsdecode(path)


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file's (or a folder's entries) data to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def sole_writer(lock: Path, refusal: str) -> Iterator[None]:
    """Be the one process that writes to a place while the block runs.

    What holds it is the file's lock, not the file: a killed process leaves it behind and is in
    nobody's way. Folders that are made for it go again when nothing else has come into them.

    Args:
        lock: a hidden file in or beside the place.
        refusal: which place it is and what to do, for the error.

    Raises:
        BusyError: another process writes there.
        UserError: nothing can be written there.
    """
    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    try:
        descriptor = _locked(lock, refusal)
    except OSError as error:
        place = asked_path(str(lock.parent))
        raise UserError(f"{place}: cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(lock: Path, refusal: str) -> int:
    """The descriptor of a file that is there and locked."""
    attempts = 0
    while True:
        attempts += 1
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            if attempts > _MOST_ATTEMPTS:
                raise  # a folder that takes no files, as /proc
            continue  # its holder has removed the folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise BusyError(f"{refusal} ({holder or 'another process'} writes there)") from None
        except OSError as error:
            text = "%s cannot be locked (%s): nothing keeps another process from writing there too"
            get_logger().warning(text, lock.parent, error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)  # its holder has removed it: this one is in nobody's way
