"""A checkpoint of which this host holds some ranks' files only."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.file_formats import SAFETENSORS
from mixtral_ms.checkpoint.formats.strategy_file import read_strategies
from mixtral_ms.checkpoint.formats.tensor_source import (
    DamagedFileError,
    Region,
    TensorInfo,
    TensorSource,
)
from mixtral_ms.checkpoint.reshard.open_checkpoint import OpenedSource
from mixtral_ms.checkpoint.shards.assemble import Strategies, open_ranks, placements_of
from mixtral_ms.checkpoint.store.manifest import Manifest, read_state
from mixtral_ms.checkpoint.store.multi_rank_save import STRATEGY_FOLDER
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Placement


def held_files(path: Path, manifest: Manifest) -> list[str]:
    """Files of tensors that are here, by their names in the manifest."""
    return [name for name in manifest.files if (path / name).is_file()]


def files_of_rank(manifest: Manifest, rank: int) -> list[str]:
    """Names of a rank's files of tensors."""
    return [name for name in manifest.files if name.startswith(f"rank_{rank}/")]


def open_own_part(path: Path, manifest: Manifest, rank: int) -> OpenedSource:
    """A checkpoint as a source of the parts that one of its ranks wrote.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest.
        rank: whose files are here; it now asks for the same parts of each tensor.
    """
    strategies = read_strategies(path / STRATEGY_FOLDER)
    placements = {
        name: _placements(name, strategies, path)
        for file in manifest.files.values()
        for name in file.tensors
    }
    (own,) = open_ranks([[path / name for name in files_of_rank(manifest, rank)]])
    source = _OwnPart(path, own, _global_infos(manifest, placements), placements, rank)
    state = read_state(path)
    return OpenedSource(path, source, manifest.world, SAFETENSORS.name, True, state)


def _placements(name: str, strategies: Strategies, path: Path) -> Mapping[int, Placement]:
    found = placements_of(name, strategies)
    if found is None:
        raise DamagedFileError(f"{path / STRATEGY_FOLDER} does not name the tensor {name}")
    return found


def _global_infos(manifest: Manifest, placements: Strategies) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint with its global shape."""
    entries = {n: one for file in manifest.files.values() for n, one in file.tensors.items()}
    shapes = {
        name: next(iter(placements[name].values())).global_shape(entry.shape)
        for name, entry in entries.items()
    }
    return {name: TensorInfo(shapes[name], entry.dtype) for name, entry in entries.items()}


class _OwnPart(TensorSource):
    """One rank's files behind global names and shapes."""

    def __init__(
        self,
        path: Path,
        files: TensorSource,
        infos: dict[str, TensorInfo],
        placements: Strategies,
        rank: int,
    ) -> None:
        self.path, self.infos = path, infos
        self._files = files
        self._regions = {
            name: placement.region(infos[name].shape, rank)
            for name in files.infos
            for placement in placements[name].values()
            if rank in placement.ranks
        }

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """The rank's own region only; another one is on another host."""
        if region != self._regions.get(name):
            raise UserError(f"{self.path}: {name} {region} lies on another host")
        return self._files.read(name)
