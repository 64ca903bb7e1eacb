"""A folder that is either whole or absent: written aside, flushed to disk, renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.checkpoint.store.folders import put_in_place, restore_moved, unfinished_path
from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path, sole_writer


@contextlib.contextmanager
def new_folder(final: Path, overwrite: bool, flag: str) -> Iterator[Path]:
    """Yield a hidden folder beside `final` that takes its place when the block succeeds.

    A folder that was there goes only when the new one is in. A failure leaves it as it was and
    removes the hidden one; what a killed process left behind goes when the next one starts. No
    other process makes the same folder meanwhile.

    Args:
        final: the folder.
        overwrite: whether one that is there may be replaced; asked before the block and after it.
        flag: with which it was given.

    Raises:
        UserError: see `require_replaceable`; or nothing can be written there.
        BusyError: another process makes it.
    """
    lock = final.with_name(f".{final.name}.lock")
    with sole_writer(lock, f"{final}: wait for its writer"):
        restore_moved(final.parent)
        require_replaceable(final, overwrite, flag)
        _remove_leftovers(final)
        new = unfinished_path(final.parent, final.name, "new")
        new.mkdir()
        try:
            yield new
            for folder, _, _ in os.walk(new):
                fsync_path(folder)
            require_replaceable(final, overwrite, flag)
            put_in_place(new, final)
        finally:
            if new.exists():
                shutil.rmtree(new)


def _remove_leftovers(final: Path) -> None:
    """Remove the hidden folders of killed processes: with the lock held they can be no other's."""
    for kind in ("new", "gone"):
        for path in final.parent.glob(f".{_literal(final.name)}.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)


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
