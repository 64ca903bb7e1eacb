"""Checkpoint folders: their names, and changes that a kill at any moment cannot spoil.

A folder named `{name}` is always whole. Everything unfinished has a name with a leading dot:
`.{name}.new-…` is being written, `.{name}.old-…` was moved aside for its replacement,
`.{name}.gone-…` is being removed.
"""

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.checkpoint.store.manifest import MANIFEST, STATE
from mixtral_ms.files import fsync_path, write_aside
from mixtral_ms.json_reader import decode_json
from mixtral_ms.log import get_logger

LATEST = "latest"
_LOCK = ".lock"
_NAME = re.compile(r"(?P<prefix>.+)-step_(?P<step>\d{7,})")
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old|gone)-[0-9a-f]{8}")


def checkpoint_name(prefix: str, step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"{prefix}-step_{step:07d}"


def parse_checkpoint_name(name: str) -> tuple[str, int] | None:
    """(prefix, step) of a name that `checkpoint_name` made; None for any other name."""
    match = _NAME.fullmatch(name)
    return (match["prefix"], int(match["step"])) if match else None


def unfinished_path(root: Path, name: str, kind: str) -> Path:
    """A fresh path in `root` for an unfinished folder; `kind` is new, old or gone."""
    return root / f".{name}.{kind}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def store_lock(root: Path) -> Iterator[bool]:
    """Hold the store for this process; yields whether it is really held.

    While it is held, an unfinished folder in `root` can only be the leftover of a dead
    process. False on a read-only folder or a file system without locks.
    """
    try:
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            held = False
        else:
            held = True
        yield held
    finally:
        os.close(descriptor)


def restore_moved(root: Path) -> None:
    """Put back a checkpoint that a dead process moved aside before its replacement was in."""
    if not root.is_dir() or not _moved(root):
        return
    with store_lock(root) as held:
        for path, name in _moved(root) if held else ():
            os.rename(path, root / name)
            fsync_path(root)


def _moved(root: Path) -> list[tuple[Path, str]]:
    found = [(path, name) for path, name, kind in _unfinished(root) if kind == "old"]
    return [(path, name) for path, name in found if not (root / name).exists()]


def clean_leftovers(root: Path) -> None:
    """Remove what dead processes left half done; call it with the lock held."""
    for path, name in _moved(root):
        os.rename(path, root / name)
    for path, name, _ in _unfinished(root):
        remove_folder(path, name)
    for path in root.glob(f".{LATEST}.*.tmp"):
        path.unlink()


def _unfinished(root: Path) -> list[tuple[Path, str, str]]:
    """(path, checkpoint's name, kind) of each unfinished folder."""
    matches = [(path, _UNFINISHED.fullmatch(path.name)) for path in sorted(root.iterdir())]
    return [(path, m["name"], m["kind"]) for path, m in matches if m and path.is_dir()]


def put_in_place(new: Path, final: Path) -> None:
    """Rename `new` to `final`; a folder that is already there goes only when `new` is in."""
    old = unfinished_path(final.parent, final.name, "old")
    if final.exists():
        os.rename(final, old)
    os.rename(new, final)
    fsync_path(final.parent)
    if old.exists():
        remove_folder(old, final.name)


def remove_folder(folder: Path, name: str) -> None:
    """Remove a checkpoint, renamed first so that half of it never looks like a checkpoint."""
    gone = unfinished_path(folder.parent, name, "gone")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def point_latest(root: Path, name: str) -> None:
    """Make `name` the checkpoint that the root stands for."""
    with write_aside(root / LATEST) as aside:
        aside.write_text(name + "\n")


def read_latest(root: Path) -> str | None:
    """Name in the `latest` file; None without one."""
    try:
        return (root / LATEST).read_text().strip()
    except FileNotFoundError:
        return None


def list_checkpoints(root: str | Path) -> list[Path]:
    """Checkpoints in `root` by step, oldest first; the step is the state's, not the file's age.

    Contents are not verified; a folder without a manifest or a state is left out. Of a damaged
    state the folder's name tells the step, so that the damage is found and not passed over.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    steps = {path: _step_of(path) for path in root.iterdir() if not path.name.startswith(".")}
    found = [path for path, step in steps.items() if step is not None]
    return sorted(found, key=lambda path: (steps[path], path.name))


def _step_of(path: Path) -> int | None:
    """The step in a checkpoint's state; None when the folder is no checkpoint."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        return int(decode_json((path / STATE).read_text(encoding="utf-8"))["step"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        parsed = parse_checkpoint_name(path.name)
        return parsed[1] if parsed else None


def prune(root: Path, name: str, keep_max: int) -> None:
    """Remove the oldest checkpoints of `name`'s series beyond `keep_max`, never `name` itself."""
    series = _series(name)
    others = [p for p in list_checkpoints(root) if p.name != name and _series(p.name) == series]
    for path in others[: max(0, len(others) + 1 - keep_max)]:
        try:
            remove_folder(path, path.name)
        except OSError as error:
            get_logger().warning("cannot remove the old checkpoint %s: %s", path, error)


def _series(name: str) -> str:
    parsed = parse_checkpoint_name(name)
    return parsed[0] if parsed else name
