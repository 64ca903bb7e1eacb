"""The folder of built libraries, which are code: the user's own, each beside its hash.

<cache>/mixtral_ms/<name>-<fingerprint>.so          loaded only while it has its hash
<cache>/mixtral_ms/<name>-<fingerprint>.so.sha256   written once the library is whole
<cache>/mixtral_ms/<name>-<fingerprint>.lock        held while one process builds
"""

import contextlib
import fcntl
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.files import sha256_file, write_aside

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PRIVATE = 0o700


def private_folder() -> Path:
    """The cache's folder, made if absent; nobody else can put a library there.

    Raises:
        OSError: there is no home, the folder cannot be made, somebody else owns it or everybody
            could exchange it.
    """
    base = _base()
    folder = base / "mixtral_ms"
    base.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=_PRIVATE)
    for one in (base, folder):
        _check_owner(one)
    if folder.is_symlink():
        raise PermissionError(f"{folder} is a link: a library is code, and is kept in a folder")
    if folder.stat().st_mode & _WRITABLE_BY_OTHERS:
        folder.chmod(_PRIVATE)  # ours, made under a generous umask
    for parent in (base, *base.resolve().parents):
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                f"everybody can exchange {folder}, for {parent} is writable by all: set "
                "XDG_CACHE_HOME to a folder of your own"
            )
    return folder


def _base() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # others are to be ignored, by its specification
        return Path(given)
    home = os.environ.get("HOME", "")
    if not home:
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise FileNotFoundError(
                "there is no home folder to keep them in: set HOME or XDG_CACHE_HOME"
            ) from None
    return Path(home) / ".cache"


def _check_owner(path: Path) -> None:
    owner = path.stat().st_uid
    if owner not in (os.getuid(), 0):
        raise PermissionError(
            f"{path} belongs to another user (number {owner}), and a library in it would be run: "
            "set XDG_CACHE_HOME to a folder of your own"
        )


def is_whole(library: Path) -> bool:
    """Whether a library is there, is this user's, and has the hash that it was built with."""
    try:
        facts = library.lstat()
        recorded = _record(library).read_text(encoding="ascii")
        return (
            stat.S_ISREG(facts.st_mode)
            and facts.st_uid in (os.getuid(), 0)
            and not facts.st_mode & _WRITABLE_BY_OTHERS
            and sha256_file(library) == recorded
        )
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def new_library(library: Path) -> Iterator[Path]:
    """Yield where to write a library; it is taken, with its hash, when the block succeeds."""
    _record(library).unlink(missing_ok=True)
    with write_aside(library) as aside:
        yield aside
        aside.chmod(_PRIVATE)
    with write_aside(_record(library)) as record:
        record.write_text(sha256_file(library), encoding="ascii")


def _record(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


@contextlib.contextmanager
def building(library: Path) -> Iterator[None]:
    """Only one process builds; the others wait for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(library.with_suffix(".lock"), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
