"""A checkpoint that several processes write together, each the folder of its own rank.

The first rank makes the unfinished folder; the others write into it and leave a record of what they
wrote; the first one waits for all records and finishes the folder. They speak through files alone,
so that a thread can save while training's collectives go on.

Where hosts share no folder, the first rank of each does that on its own host, and before it
finishes the folder these ranks show each other all records: every host has the whole manifest.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixtral_ms.checkpoint.formats.file_formats import SAFETENSORS, write_tensor_file
from mixtral_ms.checkpoint.formats.strategy_file import write_strategies
from mixtral_ms.checkpoint.formats.tensor_source import Region, outgoing
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.shards.assemble import Strategies, layout_sha256
from mixtral_ms.checkpoint.store.manifest import Manifest, file_entry
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.files import fsync_path, sha256_file, write_aside
from mixtral_ms.parallel.grid.grid_text import format_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import placements

if TYPE_CHECKING:  # it imports MindSpore, which reading a checkpoint does without
    from mixtral_ms.parallel.comm.hosts import Board

STRATEGY_FOLDER = "strategy"
WAIT_SECONDS = 1800.0  # for the slowest disk; the launcher ends a run with a dead rank long before
_POLL_SECONDS = 0.05
_NAMES_SHOWN = 5

TensorsByFile = Mapping[str, Mapping[str, np.ndarray]]
"""File stem -> tensor name -> array."""


@dataclass(frozen=True)
class SavingRanks:
    """This process among those that write a run's checkpoints into one folder."""

    network: MixtralConfig
    mesh: Mesh
    zero: bool
    """Whether optimizer moments are cut over their replicas."""
    run: str
    """Random text that the processes of this run share."""
    board: "Board | None" = None
    """Of their hosts, where these share no folder."""
    wait_seconds: float = WAIT_SECONDS

    @property
    def leads(self) -> bool:
        """Whether this rank makes and finishes the folder."""
        return self.board.hosts.leads if self.board else self.mesh.rank == 0

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks that write into the same folder."""
        return self.board.hosts.local_ranks if self.board else tuple(range(self.mesh.world_size))

    def folder(self, root: Path, name: str) -> Path:
        """The unfinished folder that all ranks mean, and no earlier run has left."""
        digest = hashlib.sha256(f"{self.run} {name}".encode()).hexdigest()
        return root / f".{name}.new-{digest[:8]}"

    def write_part(self, root: Path, name: str, tensors: TensorsByFile) -> None:
        """Write this rank's files and their record, once the first rank has made the folder.

        Raises:
            OSError: the disk is full, or there is no folder after `wait_seconds`.
        """
        new = self.folder(root, name)
        self._wait(new.is_dir, lambda: f"rank {self.local_ranks[0]} has not made {new}")
        files = write_rank_files(new / f"rank_{self.mesh.rank}", tensors)
        fsync_path(new / f"rank_{self.mesh.rank}")
        with write_aside(_record(new, self.mesh.rank)) as aside:
            aside.write_text(json.dumps({path: asdict(entry) for path, entry in files.items()}))

    def complete(self, new: Path, manifest: Manifest) -> Manifest:
        """Wait for the other ranks' parts and write the strategy files.

        Args:
            new: the unfinished folder.
            manifest: of the first rank's part.

        Returns:
            The manifest of all parts.

        Raises:
            OSError: a rank has not written its part after `wait_seconds`.
        """
        records = {rank: _record(new, rank) for rank in self.local_ranks if rank != self.mesh.rank}
        self._wait(
            lambda: all(one.exists() for one in records.values()),
            lambda: _missing(list(records.values())),
        )
        entries = {self.mesh.rank: {path: asdict(one) for path, one in manifest.files.items()}}
        for rank, record in records.items():
            entries[rank] = json.loads(record.read_text())
            record.unlink()
        if self.board:
            shown = [json.loads(text) for text in self.board.show(json.dumps(entries))]
            entries = {int(rank): those for one in shown for rank, those in one.items()}
        files = [
            {path: file_entry(entry) for path, entry in entries[rank].items()}
            for rank in range(self.mesh.world_size)
        ]
        regions, strategies = self._layout(files)
        written = write_strategies(new / STRATEGY_FOLDER, strategies)
        return replace(
            manifest,
            world=self.mesh.world_size,
            files={path: entry for several in files for path, entry in several.items()},
            others={file.relative_to(new).as_posix(): sha256_file(file) for file in written},
            strategy=format_grid(self.mesh.grid, zero=self.zero),
            layout_sha256=layout_sha256(regions),
        )

    def settled(self) -> None:
        """Return when the folder is in place on every host: only now may older ones go."""
        if self.board:
            self.board.show("")

    def _layout(
        self, files: list[dict[str, FileEntry]]
    ) -> tuple[list[dict[str, Region]], Strategies]:
        """What each rank holds of each tensor, and the strategy that says so."""
        shapes = [
            {name: one.shape for entry in several.values() for name, one in entry.tensors.items()}
            for several in files
        ]
        names = list(dict.fromkeys(name for held in shapes for name in held))
        strategies = placements(self.network, self.mesh.grid, names, zero=self.zero)
        regions = []
        for rank, held in enumerate(shapes):
            stage = rank // self.mesh.stage_size
            own = {name: strategies[name][stage] for name in held}
            regions.append({n: own[n].region(own[n].global_shape(held[n]), rank) for n in held})
        return regions, strategies

    def _wait(self, until: Callable[[], bool], failure: Callable[[], str]) -> None:
        end = time.monotonic() + self.wait_seconds
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(f"{failure()} after {self.wait_seconds:g} s")
            time.sleep(_POLL_SECONDS)


def write_rank_files(folder: Path, tensors: TensorsByFile) -> dict[str, FileEntry]:
    """Write the files of one rank into a new folder; returns name -> entry for the manifest."""
    folder.mkdir(parents=True)
    files = {}
    for stem, group in tensors.items():
        path = folder / f"{stem}{SAFETENSORS.suffix}"
        listed = [outgoing(name, array) for name, array in group.items()]
        files[f"{folder.name}/{path.name}"] = write_tensor_file(path, listed)
    return files


def _record(new: Path, rank: int) -> Path:
    return new / f"rank_{rank}.json"


def _missing(records: list[Path]) -> str:
    late = [one.stem.replace("_", " ") for one in records if not one.exists()]
    more = f" and {len(late) - _NAMES_SHOWN} more" if len(late) > _NAMES_SHOWN else ""
    verb = "has" if len(late) == 1 else "have"
    return f"{', '.join(late[:_NAMES_SHOWN])}{more} {verb} not written their part"
