"""A folder that is either whole or absent: written aside, flushed to disk, renamed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.checkpoint.store.folders import put_in_place, restore_moved, unfinished_path
from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `final` that takes its place when the block succeeds.

    A folder that was there goes only when the new one is in. A failure leaves it as it was and
    removes the hidden one; what a killed process left behind goes when the next one starts.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    restore_moved(final.parent)
    _remove_leftovers(final)
    new = unfinished_path(final.parent, final.name, "new")
    new.mkdir()
    descriptor = os.open(new, os.O_RDONLY)
    try:
        # Held while this process lives, so that another one does not take it for a leftover.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield new
        for folder, _, _ in os.walk(new):
            fsync_path(folder)
        put_in_place(new, final)
    finally:
        os.close(descriptor)
        if new.exists():
            shutil.rmtree(new)


def _remove_leftovers(final: Path) -> None:
    """Remove hidden folders that no living process holds."""
    for kind in ("new", "gone"):
        for path in final.parent.glob(f".{_literal(final.name)}.{kind}-*"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            except OSError:
                continue
            finally:
                os.close(descriptor)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def require_replaceable(final: Path, overwrite: bool, flag: str) -> None:
    """Refuse a target that holds anything, unless it is a checkpoint that may be replaced.

    Raises:
        UserError: it is there and `overwrite` is off, or it holds files of other kinds.
    """
    if not final.exists() and not final.is_symlink():
        return
    if not final.is_dir() or final.is_symlink():
        raise UserError(f"{flag} {final} is there and is not a folder: choose another name")
    inside = [path.name for path in final.iterdir()]
    if not inside:
        return
    if not overwrite:
        raise UserError(
            f"{flag} {final} is there and holds {len(inside)} entries: choose another name, or "
            "replace it with --overwrite"
        )
    if strange := [name for name in inside if not _of_checkpoint(final / name)]:
        raise UserError(
            f"{flag} {final} would be replaced, but it holds {sorted(strange)[0]}, which is no "
            "part of a checkpoint: choose another folder"
        )


def _of_checkpoint(path: Path) -> bool:
    known = ("manifest.json", "manifest.sha256", "state.json", "strategy")
    return path.name in known or (path.is_dir() and path.name.startswith("rank_"))
