"""From one sharded (or whole) checkpoint folder to another one, checked before and after."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import require_dtypes, written_formats
from mixtral_ms.checkpoint.formats.strategy_file import read_strategies, write_strategies
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry, OnBytes
from mixtral_ms.checkpoint.reshard.open_checkpoint import (
    STRATEGY_FOLDER,
    OpenedSource,
    checkpoint_folder,
    open_source,
)
from mixtral_ms.checkpoint.reshard.rewrite import (
    RankNaming,
    RankRegions,
    needed_bytes,
    regions_of_ranks,
    require_space,
    write_ranks,
)
from mixtral_ms.checkpoint.shards.assemble import Strategies, layout_sha256, placements_of
from mixtral_ms.checkpoint.shards.network_from_shapes import grid_strategies
from mixtral_ms.checkpoint.store.atomic_folder import new_folder, require_replaceable
from mixtral_ms.checkpoint.store.background_verify import Verification
from mixtral_ms.checkpoint.store.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    STATE,
    Manifest,
    write_manifest,
)
from mixtral_ms.config.checks.saved_network import saved_network
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.files import fsync_path, sha256_file
from mixtral_ms.parallel.grid.grid_text import parse_grid

DEFAULT_PREFIX = "checkpoint_"


@dataclass(frozen=True)
class TransformOptions:
    """What to transform; strategies are files or folders, grids text such as `dp=2,mp=4`."""

    src_ckpt_dir: Path
    dst_ckpt_dir: Path
    src_ckpt_strategy: Path | None = None
    dst_ckpt_strategy: Path | None = None
    src_strategy: str | None = None
    dst_strategy: str | None = None
    prefix: str | None = None
    """Of the new files' names; None: `checkpoint_`, or our own names for our own checkpoints."""
    src_prefix: str | None = None
    format: str | None = None
    """Name of the new files' format; None: the source's."""
    workers: int = 0
    overwrite: bool = False
    verify: bool = True
    """Compare the source with its manifest, where there is one, while the target is written."""
    check_replicas: bool = False


@dataclass(frozen=True)
class TransformSummary:
    """What was written."""

    folder: Path
    ranks: int
    source_ranks: int
    tensors: int
    size: int
    files: list[str]


def transform(
    options: TransformOptions,
    known: MixtralConfig | None = None,
    start_progress: Callable[[int], OnBytes] | None = None,
) -> TransformSummary:
    """Write a checkpoint again as another strategy cuts it.

    Args:
        options: what and where.
        known: the network as a configuration says it; needed for pipeline stages with an offset.
        start_progress: given the bytes to be written, returns what is told of each part of them.

    Raises:
        UserError: the source is damaged or not cut as its strategy says; the target strategy does
            not fit it; the target is there already; the disk is too small.
        DamagedFileError: a file is not what its format says.
    """
    _require_one_strategy("src", options.src_ckpt_strategy, options.src_strategy)
    _require_one_strategy("dst", options.dst_ckpt_strategy, options.dst_strategy)
    source_folder = checkpoint_folder(options.src_ckpt_dir, "--src_ckpt_dir")
    target = options.dst_ckpt_dir
    _require_apart(options.src_ckpt_dir, target)
    require_replaceable(target, options.overwrite, "--dst_ckpt_dir")
    verification = Verification(source_folder, wanted=options.verify)
    with verification.explaining():
        source = _open(options, source_folder, known)
        strategies = _target_strategies(options, source, known)
        ranks = regions_of_ranks(source.tensors.infos, strategies)
    naming = _naming(options, source)
    dtypes = {name: info.dtype for name, info in source.tensors.infos.items()}
    require_dtypes(naming.format, dtypes, "choose another --format")
    size = needed_bytes(source.tensors.infos, ranks)
    require_space(target, size, len(ranks))
    told = start_progress(size) if start_progress else None

    def on_bytes(count: int) -> None:
        verification.check()
        if told:
            told(count)

    with new_folder(target, options.overwrite, "--dst_ckpt_dir") as folder:
        others = _write_small_files(folder, source, strategies)
        files = write_ranks(
            source.tensors, ranks, folder, naming, workers=options.workers, on_bytes=on_bytes
        )
        _write_manifest(folder, files, others, ranks, options.dst_strategy)
        verification.finish()
    return TransformSummary(
        target,
        len(ranks),
        source.ranks,
        len(source.tensors.infos),
        size,
        sorted(files),
    )


def _open(options: TransformOptions, folder: Path, known: MixtralConfig | None) -> OpenedSource:
    return open_source(
        folder,
        strategy=options.src_ckpt_strategy,
        grid=options.src_strategy,
        prefix=options.src_prefix,
        known=known,
        verify=False,
        every_replica=options.check_replicas,
    )


def _require_one_strategy(end: str, file: Path | None, grid: str | None) -> None:
    if file is not None and grid is not None:
        raise UserError(
            f"--{end}_ckpt_strategy and --{end}_strategy both say the strategy: give one of them"
        )


def _require_apart(source: Path, target: Path) -> None:
    one, two = source.resolve(), target.resolve()
    if one == two or one in two.parents or two in one.parents:
        raise UserError(
            f"--dst_ckpt_dir {target} and --src_ckpt_dir {source} lie in each other: choose a "
            "folder apart from the source, which stays as it is"
        )


def _target_strategies(
    options: TransformOptions, source: OpenedSource, known: MixtralConfig | None
) -> Strategies | None:
    """Where the tensors of the source go; None: to one file, whole."""
    infos = source.tensors.infos
    if options.dst_strategy is not None:
        grid, zero = parse_grid(options.dst_strategy, "--dst_strategy")
        try:
            known = known or saved_network(source.state, source.folder / STATE)
            return grid_strategies(infos, grid, zero, known)
        except UserError as error:
            raise UserError(f"--dst_strategy {options.dst_strategy}: {error}") from error
    if options.dst_ckpt_strategy is not None:
        return read_strategies(options.dst_ckpt_strategy)
    return None


def _naming(options: TransformOptions, source: OpenedSource) -> RankNaming:
    if options.prefix is not None and os.sep in options.prefix:
        raise UserError(f"--prefix {options.prefix!r} is not the beginning of a file's name")
    own = source.own_layout and options.prefix is None
    prefix = None if own else options.prefix or DEFAULT_PREFIX
    return RankNaming(written_formats()[options.format or source.format], prefix)


def _write_small_files(
    folder: Path, source: OpenedSource, strategies: Strategies | None
) -> dict[str, str]:
    """The strategy files and, beside our own files, the state; the former's hashes."""
    if source.own_layout:
        shutil.copyfile(source.folder / STATE, folder / STATE)
        fsync_path(folder / STATE)
    if strategies is None:
        return {}
    by_name = {name: placements_of(name, strategies) for name in source.tensors.infos}
    named = {name: by_stage for name, by_stage in by_name.items() if by_stage is not None}
    files = write_strategies(folder / STRATEGY_FOLDER, named)
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


def _write_manifest(
    folder: Path,
    files: Mapping[str, FileEntry],
    others: dict[str, str],
    ranks: list[RankRegions],
    strategy: str | None,
) -> None:
    state = folder / STATE
    manifest = Manifest(
        world=len(ranks),
        state_sha256=sha256_file(state) if state.exists() else None,
        files=dict(files),
        others=others,
        strategy=strategy,
        layout_sha256=layout_sha256(ranks),
    )
    write_manifest(folder, manifest)
    for name in (MANIFEST, MANIFEST_HASH):
        fsync_path(folder / name)
