"""What the processes of a run agree on: one configuration, one state of the data, one decision.

A rank that did something else than the others would leave them waiting in a collective for ever.
"""

import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.parallel.comm.device import set_up_device
from mixtral_ms.parallel.comm.hosts import Hosts
from mixtral_ms.parallel.comm.process_groups import connect, gather_objects, sum_values
from mixtral_ms.parallel.grid.mesh import Mesh, ProcessGroup
from mixtral_ms.train.stop_signals import STOP_SIGNALS

_OWN_KEYS = frozenset({"context.device_id"})
"""Keys of the configuration that may differ between ranks."""
_DIFFERENCES_SHOWN = 5
_SHARED_SECONDS = 30.0  # until a network's file system shows a file to other hosts


def configuration_facts(config: RunConfig) -> dict[str, Any]:
    """Every key of a configuration with its value."""
    facts: dict[str, Any] = {}
    _flatten(yaml.safe_load(render_config(config)), "", facts)
    return {key: value for key, value in facts.items() if key not in _OWN_KEYS}


def _flatten(value: Any, key: str, facts: dict[str, Any]) -> None:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            _flatten(item, f"{key}.{name}" if key else str(name), facts)
    else:
        facts[key] = value


def require_same_on_all_ranks(world: ProcessGroup, facts: Mapping[str, Any]) -> None:
    """Refuse ranks of which the facts differ. All ranks must ask, and all get the same answer.

    Raises:
        UserError: naming the rank, the keys, and both values.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(gather_objects(world, digest))) == 1:
        return
    first, *others = gather_objects(world, dict(facts))
    for rank, theirs in enumerate(others, 1):
        differing = [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]
        if differing:
            raise UserError(_difference_text(rank, differing, first, theirs))


def _difference_text(
    rank: int, differing: list[str], first: Mapping[str, Any], theirs: Mapping[str, Any]
) -> str:
    shown = "".join(
        f"\n  {key}: {theirs.get(key)!r} on rank {rank}, {first.get(key)!r} on rank 0"
        for key in differing[:_DIFFERENCES_SHOWN]
    )
    more = len(differing) - _DIFFERENCES_SHOWN
    shown += f"\n  and {more} more" if more > 0 else ""
    return (
        f"rank {rank} was started with something else than rank 0:{shown}\n"
        "Start all processes with the same command, on the same files"
    )


def connect_ranks(config: RunConfig) -> Mesh:
    """Set this process's device up and meet the other ranks; all must have one configuration.

    Raises:
        UserError: the device cannot be used, or another rank was given something else.
    """
    set_up_device(config)
    facts, grid = configuration_facts(config), effective_parallel(config)
    return connect(grid, lambda world: require_same_on_all_ranks(world, facts))


@dataclass(frozen=True)
class Storage:
    """Where the ranks of a run write their checkpoints."""

    run: str = ""
    """Random text that they share."""
    hosts: Hosts | None = None
    """Where they share no folder."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes what a folder needs once; of a run with hosts only."""
        return self.hosts is not None and self.hosts.leads


def agree_on_storage(mesh: Mesh, folder: Path, *, shared: bool) -> Storage:
    """Find out which ranks see the same `folder`.

    Args:
        mesh: this rank among them.
        folder: of the run's checkpoints, which must be one for all ranks if it is `shared`.
        shared: not no_shared_storage.

    Raises:
        UserError: a rank does not see what rank 0 has written to a folder that is to be shared.
    """
    if mesh.world.size == 1:
        return Storage()
    run = gather_objects(mesh.world, uuid.uuid4().hex)[0]
    probes = [folder / f".{run}.rank_{rank}" for rank in range(mesh.world.size)]
    own = probes[mesh.rank]
    with write_aside(own) as aside:
        aside.write_text("")
    gather_objects(mesh.world, None)  # from here on they are there
    end = time.monotonic() + (_SHARED_SECONDS if shared else 0.0)
    while not all(one.exists() for one in probes) and time.monotonic() < end:
        time.sleep(0.1)
    seen = gather_objects(mesh.world, [one.exists() for one in probes])
    own.unlink()
    if not shared:
        return Storage(run, Hosts(mesh.world, tuple(those.index(True) for those in seen)))
    blind = [rank for rank, those in enumerate(seen) if not those[0]]
    if blind:
        raise UserError(
            f"rank {blind[0]} does not see what rank 0 writes to {folder}: the checkpoints of all "
            "ranks go into one folder; set --output_dir to one that all hosts share, or give "
            "--no-shared-storage, and each host keeps the part of its own ranks"
        )
    return Storage(run)


class StepSync:
    """What the ranks decide together after each step, by one small sum.

    Args:
        mesh: this rank among them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(
        self, signal_number: int | None, time_to_save: bool, error: Exception | None = None
    ) -> tuple[int | None, bool, bool]:
        """The signal that any rank has had, whether rank 0's clock says to save, and any error.

        Args:
            signal_number: that this rank has had, None without one.
            time_to_save: by this rank's clock.
            error: that this rank has met between steps.
        """
        own = np.zeros(2 + len(STOP_SIGNALS))
        own[0] = time_to_save and self.mesh.rank == 0
        own[1] = error is not None
        own[2:] = [signal_number == number for number in STOP_SIGNALS]
        save, failed, *had = sum_values(self.mesh.world, own)
        ended_by = next((n for n, times in zip(STOP_SIGNALS, had, strict=True) if times), None)
        return ended_by, bool(save), bool(failed)

    def raise_error(self, error: Exception | None) -> NoReturn:
        """Raise this rank's error, or else that of another, of which one has one. All must call."""
        texts = gather_objects(self.mesh.world, None if error is None else str(error))
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise UserError(f"rank {rank}: {text}")

    def wait(self) -> None:
        """Return when all ranks have come here."""
        sum_values(self.mesh.world, np.zeros(1))
