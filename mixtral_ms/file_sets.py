"""Several files that take the place of others together, whatever kills the process meanwhile.

They are written into a hidden folder beside the target, .<target>.writing/, which one process holds
by the lock in it. When all are flushed, a file `whole` there lists them and what they replace; from
then on they are moved. What a killed process left is thrown away before that list, and moved to the
end after it, by the next who writes the target or reads its folder.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtral_ms.errors import BusyError, UserError
from mixtral_ms.files import fsync_path, sole_writer, write_aside

_LOCK = "lock"
_WHOLE = "whole"
_SUFFIX = ".writing"
_PATIENCE_SECONDS = 60


@contextlib.contextmanager
def new_file_set(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, this process's alone; it goes with the block.

    Raises UserError when another process writes the same target.
    """
    folder = target.parent / f".{target.name}{_SUFFIX}"
    _require_real(folder)
    with sole_writer(folder / _LOCK, f"{target}: wait for its writer, or give another name"):
        _require_own(folder)
        _finish(folder)
        _empty(folder)
        try:
            yield folder
        finally:
            # What is whole but could not be moved is moved by the next who comes.
            if not (folder / _WHOLE).exists():
                shutil.rmtree(folder)


def put_set_in_place(folder: Path, new: Sequence[str], old: Sequence[str]) -> None:
    """Move the files `new` of a `new_file_set` beside its target, and remove the files `old`.

    Args:
        folder: of the set.
        new: in the order in which they are moved; a file of the old set that has the last one's
            name goes before anything else, so that no other program takes a mixture for a set.
        old: names of files that the set replaces; the same names may be in `new`.
    """
    mode = _made_in(folder).st_mode & 0o777  # as the umask, or the folder, has it
    for name in new:
        os.chmod(folder / name, mode)
        fsync_path(folder / name)
    fsync_path(folder)
    with write_aside(folder / _WHOLE) as aside:
        # Neither a slash nor a zero byte can be in a name, whatever else is.
        aside.write_bytes(b"/".join(b"\0".join(map(os.fsencode, names)) for names in (new, old)))
    _finish(folder)


def finish_interrupted_sets(parent: Path) -> None:
    """Move to the end what killed processes had begun to move in a folder.

    Raises UserError where that is not allowed.
    """
    for whole in sorted(parent.glob(f".*{_SUFFIX}/{_WHOLE}")):
        folder = whole.parent
        target = parent / folder.name[1 : -len(_SUFFIX)]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while whole.exists():
            try:
                _require_real(folder)
                with sole_writer(folder / _LOCK, f"{target}: wait for its writer"):
                    _require_own(folder)
                    _finish(folder)
                    shutil.rmtree(folder)
            except BusyError:  # its writer lives, and is about to have moved all
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            except UserError as error:
                raise UserError(
                    f"{error}; the writer of {target} was ended while it put the new files in "
                    f"place, which are whole in {folder}: read it once as somebody who may write "
                    "there"
                ) from error


def _finish(folder: Path) -> None:
    """Move what `whole` lists, as far as it is not yet moved; nothing without such a list."""
    whole = folder / _WHOLE
    if not whole.exists():
        return
    parent = folder.parent
    new, old = (
        [os.fsdecode(name) for name in names.split(b"\0") if name]
        for names in whole.read_bytes().split(b"/")
    )
    for name in reversed(old):
        if name not in new or (folder / name).exists():
            (parent / name).unlink(missing_ok=True)
    for name in new:
        if (folder / name).exists():
            os.replace(folder / name, parent / name)
    fsync_path(parent)
    whole.unlink()


def _require_real(folder: Path) -> None:
    """Raise UserError for a link: what it leads to is not ours to empty."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, where files are to be written aside; remove it")


def _require_own(folder: Path) -> None:
    """Raise UserError for somebody else's folder: what it lists is not ours to believe."""
    if os.lstat(folder).st_uid != _made_in(folder).st_uid:
        raise UserError(f"{folder} is another user's; let them write or read there, or remove it")


def _made_in(folder: Path) -> os.stat_result:
    """What a file is like that this process makes in a folder."""
    made = folder / f"{uuid.uuid4().hex}.tmp"
    made.touch()
    try:
        return made.stat()
    finally:
        made.unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
