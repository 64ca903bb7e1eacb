"""A checkpoint written again with other cuts: each rank's file is gathered from the parts.

Every tensor goes in pieces of RESHARD_PIECE_BYTES from the source files' maps into the new ones,
so that memory does not grow with the model, and of each source file only what is needed is read.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from mixtral_ms.checkpoint.formats.file_formats import FileFormat, write_tensor_file
from mixtral_ms.checkpoint.formats.regions import region_shape, row_major_blocks, whole_region
from mixtral_ms.checkpoint.formats.tensor_source import (
    OutgoingTensor,
    Region,
    TensorInfo,
    TensorSource,
    carrier,
)
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.shards.assemble import (
    Strategies,
    is_optimizer_state,
    placements_of,
    world_size,
)
from mixtral_ms.checkpoint.shards.rank_files import ADAPTER_STEM, MODEL_STEM, OPTIMIZER_STEM
from mixtral_ms.checkpoint.store.store import CheckpointError
from mixtral_ms.config.derived.parameter_row import is_lora_name
from mixtral_ms.errors import UserError

RESHARD_PIECE_BYTES = 8 << 20
RankRegions = dict[str, Region]
"""What one rank holds of each of its tensors."""
_OVERHEAD_BYTES = 1 << 20  # a file's framing and the file system's own blocks


class _StoppedError(Exception):
    """Another file could not be written, or the user has had enough."""


@dataclass(frozen=True)
class RankNaming:
    """Names of the files of one rank.

    `prefix` None means those of our own checkpoints: weights (or adapters) and optimizer state
    apart.
    """

    format: FileFormat
    prefix: str | None

    def file_of(self, name: str, rank: int) -> str:
        """The file, from the checkpoint's folder, that holds a tensor."""
        if self.prefix is not None:
            return f"rank_{rank}/{self.prefix}{rank}{self.format.suffix}"
        if is_optimizer_state(name):
            stem = OPTIMIZER_STEM
        else:
            stem = ADAPTER_STEM if is_lora_name(name) else MODEL_STEM
        return f"rank_{rank}/{stem}{self.format.suffix}"


def regions_of_ranks(
    infos: Mapping[str, TensorInfo], strategies: Strategies | None
) -> list[RankRegions]:
    """What each rank of the target holds.

    Args:
        infos: the source's tensors.
        strategies: where they go; None: whole, to rank 0. Moments that it does not name go where
            their parameters go, single numbers (global_step) to every rank.

    Raises:
        UserError: a tensor that the strategy does not name or cannot cut, or a parameter that it
            names and the source lacks.
    """
    if strategies is None:
        return [{name: whole_region(info.shape) for name, info in infos.items()}]
    _require_parameters(infos, strategies)
    ranks: list[RankRegions] = [{} for _ in range(world_size(strategies))]
    for name, info in infos.items():
        by_stage = placements_of(name, strategies)
        if by_stage is None:
            if info.shape not in ((), (1,)):
                raise UserError(
                    f"the target strategy does not name the tensor {name} of shape "
                    f"{list(info.shape)}, so nobody knows how to cut it"
                )
            for regions in ranks:
                regions[name] = whole_region(info.shape)
            continue
        for placement in by_stage.values():
            try:
                for rank in placement.ranks:
                    ranks[rank][name] = placement.region(info.shape, rank)
            except UserError as error:
                raise UserError(f"the target strategy does not fit {name}: {error}") from error
    return ranks


def _require_parameters(infos: Mapping[str, TensorInfo], strategies: Strategies) -> None:
    for name, by_stage in strategies.items():
        scalar = not next(iter(by_stage.values())).tensor_map
        if name not in infos and not is_optimizer_state(name) and not scalar:
            raise UserError(
                f"the target strategy names {name}, which the checkpoint does not have: it is the "
                "strategy of another network, or the checkpoint is cut short"
            )


def needed_bytes(infos: Mapping[str, TensorInfo], ranks: list[RankRegions]) -> int:
    """Size of all values in the target's files."""
    return sum(
        TensorInfo(region_shape(region), infos[name].dtype).nbytes
        for regions in ranks
        for name, region in regions.items()
    )


def require_space(folder: Path, size: int, files: int) -> None:
    """Refuse to begin where the disk cannot hold the target.

    Raises:
        UserError: naming both numbers.
    """
    size += files * _OVERHEAD_BYTES
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise UserError(
            f"not enough disk space for {folder}: it needs {size:,} bytes, {free:,} are free"
        )


def write_ranks(
    source: TensorSource,
    ranks: list[RankRegions],
    folder: Path,
    naming: RankNaming,
    *,
    workers: int = 0,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, FileEntry]:
    """Write every rank's files into `folder`, which is left unfinished when it fails.

    Args:
        source: global tensors.
        ranks: what each rank holds, see `regions_of_ranks`.
        folder: exists.
        naming: names and format of the files.
        workers: files written at a time; 0: as many as there are processors, at most 8.
        on_bytes: told of progress, from any thread.

    Returns:
        File, from `folder` -> its hashes.

    Raises:
        CheckpointError: the disk is full or cannot be written.
        DamagedFileError: a source file has changed meanwhile.
    """
    stopped = Event()

    def told(size: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        if on_bytes:
            on_bytes(size)

    files = _files(source, ranks, naming)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        jobs = {
            name: pool.submit(_write_file, folder / name, tensors, told)
            for name, tensors in files.items()
        }
        try:
            wait(jobs.values(), return_when=FIRST_EXCEPTION)
            failed = [job for job in jobs.values() if job.done() and job.exception()]
            if failed:
                failed[0].result()  # raises its error
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: job.result() for name, job in jobs.items()}


def _files(
    source: TensorSource, ranks: list[RankRegions], naming: RankNaming
) -> dict[str, list[OutgoingTensor]]:
    files: dict[str, list[OutgoingTensor]] = {}
    for rank, regions in enumerate(ranks):
        for name, region in regions.items():
            tensor = outgoing_region(source, name, region)
            files.setdefault(naming.file_of(name, rank), []).append(tensor)
    return files


def outgoing_region(source: TensorSource, name: str, region: Region) -> OutgoingTensor:
    """A region of a source's tensor as a tensor to be written, read piece by piece."""
    info = TensorInfo(region_shape(region), source.infos[name].dtype)
    most = RESHARD_PIECE_BYTES // carrier(info.dtype).itemsize

    def pieces() -> Iterator[np.ndarray]:
        return (source.read(name, block) for block in row_major_blocks(region, most))

    return OutgoingTensor(name, info, pieces)


def _write_file(
    path: Path, tensors: list[OutgoingTensor], on_bytes: Callable[[int], None]
) -> FileEntry:
    try:
        path.parent.mkdir(exist_ok=True)
        return write_tensor_file(path, tensors, on_bytes=on_bytes)
    except OSError as error:
        free = shutil.disk_usage(path.parent.parent).free
        raise CheckpointError(
            f"cannot write {path.parent.name}/{path.name}: {error.strerror or error} "
            f"({free:,} bytes are free); the source and what was at the target are untouched"
        ) from error
