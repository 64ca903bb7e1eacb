"""Files that are either whole or absent: written aside, flushed to disk, renamed."""

import contextlib
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

_HASH_CHUNK = 1 << 22
_ASIDE = re.compile(r"\.(.+)\.(?:[0-9a-f]{8}\.tmp|converting)")
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
        yield aside
        fsync_path(aside)
        os.replace(aside, target)
        fsync_path(target.parent)
    except OSError as error:
        if error.filename is None and error.errno in _WRITE_ERRORS:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


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
