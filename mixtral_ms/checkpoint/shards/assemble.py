"""From the files of each rank and a strategy to the global tensors, with everything checked."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.regions import whole_region
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorInfo, TensorSource
from mixtral_ms.checkpoint.shards.replica_checks import check_parts
from mixtral_ms.checkpoint.shards.sharded_source import Part, ShardedSource
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Placement
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS, parameter_of

Strategies = Mapping[str, Mapping[int, Placement]]
"""Tensor name -> pipeline stage -> placement."""

_NAMES_SHOWN = 3


def open_ranks(files: Sequence[Sequence[Path]]) -> list[TensorSource]:
    """The tensors of each rank's files, in the order of the ranks.

    Raises:
        UserError: two files of a rank hold a tensor of the same name.
        DamagedFileError: a file is not what its format says.
    """
    return [MergedSource(paths[0].parent, [open_tensors(p) for p in paths]) for paths in files]


def assemble(
    path: Path,
    ranks: Sequence[TensorSource],
    strategies: Strategies,
    *,
    every_replica: bool = False,
) -> ShardedSource:
    """The global tensors of which `ranks` hold the parts.

    Args:
        path: what the user named.
        ranks: the tensors of each rank.
        strategies: where each tensor is. Moments it does not name are where their parameters are.
        every_replica: compare all values of parts that must be equal, not only a sample.

    Raises:
        UserError: the strategy is not this checkpoint's; tensor and ranks are named.
    """
    _require_world(path, ranks, strategies)
    infos: dict[str, TensorInfo] = {}
    parts: dict[str, list[Part]] = {}
    for name in _names_in_order(ranks, strategies):
        by_stage = placements_of(name, strategies)
        if by_stage is None:
            infos[name], parts[name] = _on_every_rank(path, name, ranks)
        elif found := _parts(path, name, by_stage, ranks):
            infos[name], parts[name] = found
    _check_moments(path, infos)
    check_parts(path, infos, parts, every_replica=every_replica)
    return ShardedSource(path, infos, parts)


def world_size(strategies: Strategies) -> int:
    """How many ranks a strategy is for."""
    return max(
        placement.ranks.stop for by_stage in strategies.values() for placement in by_stage.values()
    )


def placements_of(name: str, strategies: Strategies) -> Mapping[int, Placement] | None:
    """Where a tensor is; a moment that is not named is where its parameter is."""
    return strategies.get(name) or strategies.get(parameter_of(name))


def layout_sha256(ranks: Sequence[Mapping[str, Region]]) -> str:
    """Hash of which rank holds what of each tensor, however a strategy says it."""
    lines = sorted(
        f"{name} {rank} {[(cut.start, cut.stop) for cut in region]}\n"
        for rank, regions in enumerate(ranks)
        for name, region in regions.items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _require_world(path: Path, ranks: Sequence[TensorSource], strategies: Strategies) -> None:
    if len(ranks) != (expected := world_size(strategies)):
        raise UserError(
            f"the strategy is for {expected} devices, {path} holds the files of {len(ranks)} "
            f"(rank_0 to rank_{len(ranks) - 1}): give this checkpoint's own strategy, "
            "or copy the missing ranks"
        )


def _names_in_order(ranks: Sequence[TensorSource], strategies: Strategies) -> list[str]:
    """Every tensor that a rank has, then those that the strategy alone names."""
    found = [name for source in ranks for name in source.infos]
    return list(dict.fromkeys([*found, *strategies]))


def _parts(
    path: Path, name: str, by_stage: Mapping[int, Placement], ranks: Sequence[TensorSource]
) -> tuple[TensorInfo, list[Part]] | None:
    """A tensor's global shape and parts; None for state that was not saved."""
    holders = {rank: placement for placement in by_stage.values() for rank in placement.ranks}
    present = [rank for rank, source in enumerate(ranks) if name in source.infos]
    scalar = not next(iter(by_stage.values())).tensor_map
    if not present and (scalar or is_optimizer_state(name)):
        return None
    if surplus := sorted(set(present) - set(holders)):
        raise UserError(
            f"{path}: rank {surplus[0]} has the tensor {name}, but by the strategy it is on rank "
            f"{_ranks(holders)} only: it is not this checkpoint's strategy"
        )
    if missing := sorted(set(holders) - set(present)):
        raise UserError(
            f"{path}: rank {_ranks(missing)} has no tensor {name}, which the strategy puts there: "
            "the file is cut short, or it is not this checkpoint's strategy"
        )
    local = _common_info(path, name, ranks, present)
    try:
        shapes = {placement.global_shape(local.shape) for placement in by_stage.values()}
        if len(shapes) > 1:
            raise UserError(f"pipeline stages give it the shapes {sorted(shapes)}")
        info = TensorInfo(shapes.pop(), local.dtype)
        regions = {rank: placement.region(info.shape, rank) for rank, placement in holders.items()}
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}: it is not this checkpoint's strategy") from error
    return info, [Part(regions[rank], rank, ranks[rank]) for rank in sorted(holders)]


def _common_info(
    path: Path, name: str, ranks: Sequence[TensorSource], present: Sequence[int]
) -> TensorInfo:
    first = ranks[present[0]].infos[name]
    for rank in present:
        if (info := ranks[rank].infos[name]) != first:
            raise UserError(
                f"{path}: {name} is {info.dtype} {list(info.shape)} on rank {rank}, but "
                f"{first.dtype} {list(first.shape)} on rank {present[0]}; the parts of a tensor "
                "have one shape: it is not this checkpoint's strategy, or ranks of two are mixed"
            )
    return first


def is_optimizer_state(name: str) -> bool:
    """Whether a tensor may be missing from a checkpoint that holds weights only."""
    return name.startswith((*MOMENTS, "accu_grads."))


def _on_every_rank(
    path: Path, name: str, ranks: Sequence[TensorSource]
) -> tuple[TensorInfo, list[Part]]:
    """A single number such as global_step, which no strategy names."""
    present = [rank for rank, source in enumerate(ranks) if name in source.infos]
    info = ranks[present[0]].infos[name]
    if info.nbytes != TensorInfo((), info.dtype).nbytes:
        raise UserError(
            f"{path}: the strategy does not name the tensor {name} (shape {list(info.shape)} on "
            f"rank {present[0]}), so its cut is unknown: give this checkpoint's own strategy"
        )
    first = ranks[present[0]].read(name)
    for rank in present:
        if ranks[rank].infos[name] != info or ranks[rank].read(name).tobytes() != first.tobytes():
            raise UserError(
                f"{path}: {name} differs between rank {present[0]} and rank {rank}: "
                "the files are not of one checkpoint"
            )
    return info, [Part(whole_region(info.shape), rank, ranks[rank]) for rank in present]


def _check_moments(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """A moment has its parameter's shape: a wrong optimizer shard shows here."""
    for name, info in infos.items():
        parameter = infos.get(parameter_of(name), info)
        if info.shape != parameter.shape:
            raise UserError(
                f"{path}: by the strategy {name} has the shape {list(info.shape)}, its parameter "
                f"{list(parameter.shape)}: it is not this checkpoint's strategy"
            )


def _ranks(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    more = len(ranks) - _NAMES_SHOWN
    return ", ".join(map(str, ranks[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")
