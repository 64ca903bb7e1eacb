"""Resuming from checkpoints of which each host holds its own part (no_shared_storage)."""

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mixtral_ms.checkpoint.reshard.host_files import (
    files_of_rank,
    held_files,
    open_own_part,
)
from mixtral_ms.checkpoint.reshard.open_checkpoint import OpenedSource, open_source
from mixtral_ms.checkpoint.store.folders import list_checkpoints, restore_moved
from mixtral_ms.checkpoint.store.manifest import (
    MANIFEST,
    DamagedManifestError,
    Manifest,
    other_problems,
    read_manifest,
    verify_files,
)
from mixtral_ms.checkpoint.store.store import damage_error, require_undamaged
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.hosts import Hosts, broadcast_bytes
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.parallel.grid.mesh import ProcessGroup
from mixtral_ms.progress import progress_bar

_CHUNK_BYTES = 8 << 20


def open_on_all_hosts(root: Path, name: str | None, hosts: Hosts, strategy: str) -> OpenedSource:
    """The newest checkpoint that all hosts have, or the named one. All ranks must ask.

    On the layout that it was written on each rank reads its own files. On another one hosts first
    get the files that they lack, through the collectives.

    Args:
        root: a checkpoint or a folder of several, on each host.
        name: one of those.
        hosts: of the run.
        strategy: the layout of this run, as the manifest says it.

    Raises:
        UserError: no host has one, they have none in common, or it is damaged.
    """
    if name is None and (root / MANIFEST).exists():
        root, name = root.parent, root.name
    path = root / _common_name(root, name, hosts)
    manifest = _same_manifest(path, hosts)
    held = held_files(path, manifest)
    ranks = hosts.local_ranks
    share = held[ranks.index(hosts.world.index) :: len(ranks)]
    problems = verify_files(path, manifest, share)
    if hosts.leads:
        problems += other_problems(path, manifest)
    require_undamaged_everywhere(hosts.world, path, problems)
    own = files_of_rank(manifest, hosts.world.index)
    suffices = manifest.strategy == strategy and bool(own) and set(own) <= set(held)
    if all(gather_objects(hosts.world, suffices)):
        get_logger().info("resuming from %s: each rank from its own files", path)
        return open_own_part(path, manifest, hosts.world.index)
    _complete(path, manifest, hosts, held)
    get_logger().info("resuming from %s", path)
    return open_source(path, verify=False)


def _common_name(root: Path, name: str | None, hosts: Hosts) -> str:
    if hosts.leads:
        restore_moved(root)
    names = [one.name for one in list_checkpoints(root)]
    everywhere = gather_objects(hosts.world, names)
    if name is not None:
        for rank, theirs in enumerate(everywhere):
            if name not in theirs:
                raise UserError(f"{root} holds no checkpoint {name!r} on the host of rank {rank}")
        return name
    common = [one for one in everywhere[0] if all(one in theirs for theirs in everywhere)]
    if not common:
        shown = "\n".join(
            f"  rank {rank}: {', '.join(theirs) or 'none'}"
            for rank, theirs in enumerate(everywhere)
            if hosts.leaders[rank] == rank
        )
        raise UserError(f"the hosts have no checkpoint in common in {root}:\n{shown}")
    if names[-1] != common[-1]:
        get_logger().info("%s is not on every host: taking %s", names[-1], common[-1])
    return common[-1]


def _same_manifest(path: Path, hosts: Hosts) -> Manifest:
    manifest: Manifest | None = None
    problems: list[str] = []
    try:
        manifest = read_manifest(path)
    except DamagedManifestError as error:
        problems = [str(error)]
    require_undamaged_everywhere(hosts.world, path, problems)
    if manifest is None:
        raise damage_error(path, problems)
    if len(set(gather_objects(hosts.world, repr(manifest)))) > 1:
        raise UserError(f"{path} is another checkpoint on another host: their manifests differ")
    return manifest


def require_undamaged_everywhere(world: ProcessGroup, path: Path, problems: list[str]) -> None:
    """Raises UserError on all ranks where any of them has found problems. All must ask."""
    everywhere = gather_objects(world, problems)
    require_undamaged(path, [one for several in everywhere for one in several])


def _complete(path: Path, manifest: Manifest, hosts: Hosts, held: Sequence[str]) -> None:
    """Give every host the files of ranks on other hosts."""
    everywhere = gather_objects(hosts.world, list(held))
    owners = {
        name: [rank for rank in sorted(set(hosts.leaders)) if name in everywhere[rank]]
        for name in manifest.files
    }
    require_undamaged_everywhere(
        hosts.world, path, [f"{name} is on no host" for name, ranks in owners.items() if not ranks]
    )
    lacking = [name for name, ranks in owners.items() if len(ranks) < len(set(hosts.leaders))]
    total = sum(manifest.files[name].size for name in lacking)
    with progress_bar(total, "files of other hosts", "B", scale=True) as bar:
        for name in lacking:
            wanted = hosts.leads and name not in held
            _receive(path / name, manifest.files[name].size, owners[name][0], hosts, wanted, bar)
    received = [name for name in lacking if name not in held] if hosts.leads else []
    require_undamaged_everywhere(hosts.world, path, verify_files(path, manifest, received))


def _receive(file: Path, size: int, source: int, hosts: Hosts, wanted: bool, bar: tqdm) -> None:
    """Move one file through the collectives; it is written where it is wanted."""
    with contextlib.ExitStack() as stack:
        sent: BinaryIO = io.BytesIO()
        if hosts.world.index == source:
            sent = stack.enter_context(open(file, "rb"))
        if wanted:
            aside = stack.enter_context(write_aside(file))
            received = stack.enter_context(open(aside, "wb"))
        for begin in range(0, size, _CHUNK_BYTES):
            part = min(_CHUNK_BYTES, size - begin)
            data = broadcast_bytes(hosts.world, source, part, partial(sent.read, part))
            if wanted:
                received.write(data)
            bar.update(part)
