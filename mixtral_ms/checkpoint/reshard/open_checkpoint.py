"""Opening a checkpoint folder for what it holds in all: one rank's files, or those of many.

What is checked without reading everything: every rank and tensor is there, shapes agree with the
strategy and with each other, samples of replicas are equal. With a manifest all bytes are compared
with their hashes first. Without one, a flipped bit outside the samples cannot be seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.file_formats import (
    SAFETENSORS,
    format_of,
    written_formats,
    written_suffixes,
)
from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.strategy_file import read_strategies
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.shards.assemble import Strategies, assemble, layout_sha256, open_ranks
from mixtral_ms.checkpoint.shards.network_from_shapes import (
    shape_contradiction,
    source_strategies,
)
from mixtral_ms.checkpoint.shards.rank_files import (
    STEMS,
    find_rank_files,
    is_rank_folders,
    tensor_files,
)
from mixtral_ms.checkpoint.shards.sharded_source import ShardedSource
from mixtral_ms.checkpoint.store.conversion_record import require_as_recorded
from mixtral_ms.checkpoint.store.folders import list_checkpoints, restore_moved
from mixtral_ms.checkpoint.store.manifest import (
    MANIFEST,
    STATE,
    DamagedManifestError,
    Manifest,
    read_manifest,
    read_state,
    verify_checkpoint,
)
from mixtral_ms.checkpoint.store.multi_rank_save import STRATEGY_FOLDER
from mixtral_ms.checkpoint.store.store import damage_error, find_checkpoint, require_undamaged
from mixtral_ms.config.checks.saved_network import saved_network
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.log import get_logger

_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class OpenedSource:
    """A checkpoint that was opened and checked."""

    folder: Path
    """It, or the file."""
    tensors: TensorSource
    """Global."""
    ranks: int
    format: str
    """Of its files, or the one to write instead of one that is only read: a name of the table."""
    own_layout: bool = False
    """Weights and optimizer state are in files of our own names, a state beside them."""
    state: Mapping[str, Any] = field(default_factory=dict)


def open_source(
    path: Path,
    *,
    strategy: Path | None = None,
    grid: str | None = None,
    prefix: str | None = None,
    known: MixtralConfig | None = None,
    verify: bool = True,
    every_replica: bool = False,
) -> OpenedSource:
    """A checkpoint: a file, a folder of files, of ranks, or of our own checkpoints.

    Args:
        path: what the user named.
        strategy: strategy file or folder. Without one and without `grid` the checkpoint is of one
            rank, or `strategy/` lies in it.
        grid: the strategy as text, for a checkpoint of this network.
        prefix: take only files whose names begin so.
        known: the network as a configuration says it.
        verify: compare everything with the manifest, or with a conversion's record, first.
        every_replica: compare all values of parts that must be equal, not only samples.

    Raises:
        UserError: a rank or tensor is missing, the checkpoint is damaged, or the strategy is not
            its own; rank, file and tensor are named.
        DamagedFileError: a file is not what its format says.
    """
    path = checkpoint_folder(path)
    if not is_rank_folders(path) and not (path / MANIFEST).is_file():
        if strategy or grid:
            raise UserError(f"{path} holds no folders rank_0, rank_1, … that a strategy could cut")
        if verify:
            require_as_recorded(path)
        return _open_whole(path)
    manifest = _checked_manifest(path, verify)
    state = read_state(path)
    files = find_rank_files(path, prefix)
    if manifest and len(files) != manifest.world:
        raise UserError(f"{path} has {len(files)} ranks, by its manifest {manifest.world}")
    ranks = open_ranks(files)
    known = known or saved_network(state, path / STATE)
    strategies = _strategies(path, ranks, strategy, grid, known)
    tensors = ranks[0]
    if strategies is not None:
        tensors = assemble(path, ranks, strategies, every_replica=every_replica)
        _check_layout(path, tensors, manifest)
        if contradiction := shape_contradiction(tensors.infos):
            raise UserError(
                f"{path}: by the strategy {contradiction}: it is not this checkpoint's strategy"
            )
    own = bool(state) and all(file.stem in STEMS for file in files[0])
    return OpenedSource(path, tensors, len(ranks), _format_to_write(files[0][0]), own, state)


def checkpoint_folder(path: Path, flag: str = "") -> Path:
    """`path`, or the latest checkpoint in it where it is the folder of our own checkpoints.

    Args:
        path: what the user named.
        flag: with this, if with a flag.

    Raises:
        UserError: there is no such file or folder, or not the checkpoint that `latest` names.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        _require_file_or_folder(path, flag)
    elif not path.exists():
        raise UserError(f"{flag}: {path} does not exist" if flag else f"{path} does not exist")
    restore_moved(path)
    if not path.is_dir() or is_rank_folders(path) or not list_checkpoints(path):
        return path
    return find_checkpoint(path)


def _require_file_or_folder(path: Path, flag: str) -> None:
    """Refuse a link to nothing, a pipe and a device, which could be waited for without end."""
    if not path.is_dir():
        require_file(path, f"{flag}:" if flag else "")


def own_strategy(folder: Path) -> Path | None:
    """The folder of strategy files that lies in a checkpoint."""
    own = folder / STRATEGY_FOLDER
    return own if own.is_dir() else None


def _open_whole(path: Path) -> OpenedSource:
    """A file, or all the tensor files of a folder."""
    if path.is_file():
        return OpenedSource(path, open_tensors(path), 1, _format_to_write(path))
    files = tensor_files(path)
    if not files:
        suffixes = " or ".join(written_suffixes())
        raise UserError(f"{path} holds no rank_0, rank_1, … and no {suffixes} file")
    sources = [open_tensors(file) for file in files]
    return OpenedSource(path, MergedSource(path, sources), 1, _format_to_write(files[0]))


def _format_to_write(file: Path) -> str:
    found = format_of(file)
    return found.name if found and found.name in written_formats() else SAFETENSORS.name


def _checked_manifest(path: Path, verify: bool) -> Manifest | None:
    if not (path / MANIFEST).exists():
        return None
    if verify:
        require_undamaged(path, verify_checkpoint(path))
    try:
        return read_manifest(path)
    except DamagedManifestError as error:
        raise damage_error(path, [str(error)]) from error


def _strategies(
    path: Path,
    ranks: list[TensorSource],
    strategy: Path | None,
    grid: str | None,
    known: MixtralConfig | None,
) -> Strategies | None:
    """Where the tensors are; None where one rank holds them whole."""
    if grid is not None:
        return source_strategies(path, ranks, grid, "--src_strategy", known)
    own = own_strategy(path)
    if own is not None and strategy in (None, own):
        strategy = own
        get_logger().info("%s: its strategy is taken from %s", path, strategy)
    if strategy is not None:
        return read_strategies(strategy)
    if len(ranks) > 1:
        raise UserError(
            f"{path} holds the files of {len(ranks)} ranks: give the strategy they were cut by "
            "with --src_ckpt_strategy"
        )
    return None


def _check_layout(path: Path, tensors: ShardedSource, manifest: Manifest | None) -> None:
    """The manifest knows which rank holds what."""
    if manifest is None or manifest.layout_sha256 is None:
        return
    if layout_sha256(tensors.regions_of_ranks()) != manifest.layout_sha256:
        raise UserError(
            f"{path}: the strategy is not the one that this checkpoint was written with"
            + (f" ({manifest.strategy})" if manifest.strategy else "")
            + f": its own is in {path / STRATEGY_FOLDER}"
        )
