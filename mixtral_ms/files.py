"""Files that are either whole or absent: written aside, flushed to disk, renamed."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_HASH_CHUNK = 1 << 22


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    A reader never sees half a file, and a failure leaves what was at `path` untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        fsync_path(aside)
        os.replace(aside, target)
        fsync_path(target.parent)
    finally:
        aside.unlink(missing_ok=True)


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
