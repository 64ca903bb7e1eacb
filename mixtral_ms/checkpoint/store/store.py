"""Saving, finding and loading checkpoints (layout: manifest.py; renames: folders.py)."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.dtype_casts import cast
from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError, TensorSource
from mixtral_ms.checkpoint.store.folders import (
    clean_leftovers,
    list_checkpoints,
    parse_checkpoint_name,
    point_latest,
    prune,
    put_in_place,
    read_latest,
    restore_moved,
    store_lock,
    unfinished_path,
)
from mixtral_ms.checkpoint.store.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    STATE,
    DamagedManifestError,
    Manifest,
    read_manifest,
    read_state,
    verify_checkpoint,
    write_manifest,
)
from mixtral_ms.checkpoint.store.multi_rank_save import SavingRanks, TensorsByFile, write_rank_files
from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path
from mixtral_ms.log import get_logger

_OVERHEAD_BYTES = 1 << 20  # headers, manifest and the file system's own blocks
_PROBLEMS_SHOWN = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are as they were."""


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name, each read when asked for and not kept.

    bfloat16, which numpy does not have, is given as float32.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, array = self.source.infos[name].dtype, self.source.read(name)
        return cast(array, dtype, "float32") if dtype == "bfloat16" else array

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.infos)

    def __len__(self) -> int:
        return len(self.source.infos)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    `tensors` maps a file's stem ("model", "optimizer") to its tensors, which are read from
    disk one by one when asked for; `state` is what was given to `save_checkpoint`.
    """

    path: Path
    tensors: dict[str, TensorFile]
    state: dict[str, Any]


def save_checkpoint(
    root: str | Path,
    name: str,
    tensors: TensorsByFile,
    state: Mapping[str, Any],
    *,
    keep_max: int | None = None,
    ranks: SavingRanks | None = None,
) -> Path:
    """Save a checkpoint so that a kill or a full disk at any moment loses nothing.

    It is written aside, flushed to disk, renamed to `root/name`, and only then does `latest`
    name it and do older ones go. Several processes all call it with their own parts: the first
    rank's call returns when the whole is in place, another's when its part is written.

    Args:
        root: folder of the run's checkpoints; created when missing.
        name: the checkpoint's folder, see `checkpoint_name`; one of that name is replaced.
        tensors: file stem -> tensor name -> array.
        state: JSON; must hold the integer "step", which orders checkpoints.
        keep_max: checkpoints of the same prefix to keep, this one included; None keeps all.
        ranks: this process among those that save together; None: it is alone.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a state or dtype that cannot be saved.
        CheckpointError: the disk is full or cannot be written.
    """
    root = Path(root)
    if not name or name.startswith(".") or os.sep in name:
        raise ValueError(f"checkpoint name {name!r} is not a folder's name")
    if keep_max is not None and keep_max < 1:
        raise ValueError(f"keep_max is {keep_max}; it must be at least 1, or None to keep all")
    state_text = state_bytes(state)
    needed = _needed_bytes(tensors, len(ranks.local_ranks) if ranks else 1)
    try:
        if ranks is not None and not ranks.leads:
            ranks.write_part(root, name, tensors)
            return root / name
        root.mkdir(parents=True, exist_ok=True)
        with store_lock(root) as held:
            if held:
                clean_leftovers(root)
            if shutil.disk_usage(root).free < needed:
                raise OSError("not enough free disk space")
            _write_and_rename(root, name, tensors, state_text, ranks)
            if ranks:
                ranks.settled()
            point_latest(root, name)
            if keep_max is not None:
                prune(root, name, keep_max)
    except OSError as error:
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        raise CheckpointError(
            f"cannot save the checkpoint {root / name}: {error.strerror or error} "
            f"(it needs {needed:,} bytes, {free:,} are free); "
            "earlier checkpoints are untouched"
        ) from error
    return root / name


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """The text of state.json.

    Raises:
        ValueError: it is not JSON (NaN is not), or has no integer "step".
    """
    if not isinstance(state.get("step"), int):
        raise ValueError(f'state["step"] is {state.get("step")!r}; it must be an integer')
    try:
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
    except TypeError as error:
        raise ValueError(f"a checkpoint's state must be JSON: {error}") from error


def _needed_bytes(tensors: TensorsByFile, parts: int) -> int:
    """Of a checkpoint of so many parts of about this one's size."""
    own = sum(array.nbytes for group in tensors.values() for array in group.values())
    return parts * own + _OVERHEAD_BYTES


def _write_and_rename(
    root: Path, name: str, tensors: TensorsByFile, state_text: bytes, ranks: SavingRanks | None
) -> None:
    new = ranks.folder(root, name) if ranks else unfinished_path(root, name, "new")
    try:
        files = write_rank_files(new / f"rank_{ranks.mesh.rank if ranks else 0}", tensors)
        manifest = Manifest(1, hashlib.sha256(state_text).hexdigest(), files)
        (new / STATE).write_bytes(state_text)
        write_manifest(new, ranks.complete(new, manifest) if ranks else manifest)
        for file in (STATE, MANIFEST, MANIFEST_HASH):
            fsync_path(new / file)
        for folder, _, _ in os.walk(new):
            fsync_path(folder)
        put_in_place(new, root / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint; tensors are read when asked for.

    Args:
        path: a checkpoint's folder, see `resolve_checkpoint`.
        verify: read everything once and compare all hashes first; False when
            `resolve_checkpoint` has just done so.

    Raises:
        UserError: it is damaged; the message says what is.
    """
    path = Path(path)
    if verify:
        require_undamaged(path, verify_checkpoint(path))
    try:
        files = read_manifest(path).files
        tensors = {Path(name).stem: TensorFile(open_tensors(path / name)) for name in files}
    except (DamagedManifestError, DamagedFileError) as error:
        raise UserError(_damage_text(path, [str(error)])) from error
    return Checkpoint(path, tensors, read_state(path))


def resolve_checkpoint(path: str | Path, name: str | None = None) -> Path:
    """The checkpoint that a user's `--load_checkpoint` (and checkpoint name) means, verified.

    Args:
        path: a checkpoint's folder, or the folder of several, whose `latest` is then taken.
        name: one of the checkpoints in the folder `path`, instead of its latest.

    Raises:
        UserError: there is none, or it is damaged; the message names the damage and the
            newest whole one beside it.
    """
    path = find_checkpoint(path, name)
    require_undamaged(path, verify_checkpoint(path))
    return path


def find_checkpoint(path: str | Path, name: str | None = None) -> Path:
    """As `resolve_checkpoint`, without looking into it."""
    path = Path(path)
    for folder in (path, path.parent):
        restore_moved(folder)
    is_checkpoint = name is None and ((path / MANIFEST).exists() or (path / STATE).exists())
    root = path.parent if is_checkpoint else path
    if not path.is_dir():
        raise UserError(f"--load_checkpoint: the folder {path} does not exist")
    return path if is_checkpoint else _named_or_latest(root, name)


def require_undamaged(path: Path, problems: Sequence[str]) -> None:
    """Raises UserError with the first problems, if any, and the newest whole one beside it."""
    if problems:
        raise damage_error(path, problems)


def damage_error(path: Path, problems: Sequence[str]) -> UserError:
    """What says that a checkpoint has problems, and which whole one beside it is the newest."""
    return UserError(_damage_text(path, problems) + _offer(path.parent, path))


def _named_or_latest(root: Path, name: str | None) -> Path:
    found = list_checkpoints(root)
    wanted = name or read_latest(root)
    if wanted and (root / wanted).is_dir():
        return root / wanted
    if not found:
        raise UserError(f"--load_checkpoint: {root} holds no checkpoint")
    if wanted:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root} holds no checkpoint {wanted!r}; it holds {names}{_offer(root)}")
    get_logger().info("%s has no file 'latest': taking its newest, %s", root, found[-1].name)
    return found[-1]


def _damage_text(path: Path, problems: Sequence[str]) -> str:
    shown = "; ".join(problems[:_PROBLEMS_SHOWN])
    more = len(problems) - _PROBLEMS_SHOWN
    return f"the checkpoint {path} is damaged: {shown}" + (f"; and {more} more" if more > 0 else "")


def _offer(root: Path, damaged: Path | None = None) -> str:
    """Name the newest checkpoint in `root` that is whole, and of the damaged one's series."""
    for path in reversed(list_checkpoints(root)):
        if path != damaged and _of_one_run(path, damaged) and not verify_checkpoint(path):
            return f". The newest good one is {path.name}; to go on from it: {path}"
    return ". No other whole checkpoint of its series is beside it"


def _of_one_run(path: Path, damaged: Path | None) -> bool:
    """Whether a run has saved both, one after the other: conversions side by side have not."""
    parsed = parse_checkpoint_name(path.name)
    if parsed is None or damaged is None:
        return parsed is not None
    return (parse_checkpoint_name(damaged.name) or ("",))[0] == parsed[0]
