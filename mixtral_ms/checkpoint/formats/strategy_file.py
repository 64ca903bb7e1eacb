"""MindSpore's strategy files: where every tensor of a distributed checkpoint is.

A run leaves one file a rank, alike for all ranks of a pipeline stage; a merged file holds all
stages, with `<stage>-` before each tensor's name. Both are protobuf messages.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_as_wanted
from mixtral_ms.files import fsync_path, write_aside
from mixtral_ms.parallel.grid.placement import Placement

if TYPE_CHECKING:
    from mindspore.train.node_strategy_pb2 import ParallelLayouts, ParallelStrategyMap

Placements = Mapping[str, Mapping[int, Placement]]
"""Tensor name -> pipeline stage -> placement."""
_Stages = dict[int, dict[str, Placement]]

_WANTED = "a strategy file of MindSpore"
_MERGED_NAME = re.compile(r"(\d+)-([^-]+)")
_RANK_FILE = re.compile(r"rank_(\d+)\.ckpt")
_COUNT = re.compile(r"(\d+) layouts")


def write_strategies(folder: str | os.PathLike[str], placements: Placements) -> list[Path]:
    """Write `ckpt_strategy_rank_<rank>.ckpt` for each rank, as a run does, into a new folder.

    `mindspore.merge_pipeline_strategys` makes of the folder the single file that MindSpore's other
    tools want; with one stage any of the files is that.

    Raises:
        UserError: the folder holds something, or no strategy file can say where a tensor is.
    """
    target, stages = Path(folder), _by_stage(placements)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and is not an empty folder: choose another one")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir(parents=True)
    names = []
    try:
        for stage, layouts in stages.items():
            content = _message({stage: layouts}, merged=False).SerializeToString()
            for rank in next(iter(layouts.values())).ranks:
                names.append(f"ckpt_strategy_rank_{rank}.ckpt")
                with write_aside(aside / names[-1]) as path:
                    path.write_bytes(content)
        os.replace(aside, target)
        fsync_path(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [target / name for name in names]


def write_merged_strategy(file: str | os.PathLike[str], placements: Placements) -> None:
    """Write all stages into one file, as `mindspore.merge_pipeline_strategys` does.

    Raises:
        UserError: the file is there already, or no strategy file can say where a tensor is.
    """
    if Path(file).exists():
        raise UserError(f"{file} is there already: choose another name")
    content = _message(_by_stage(placements), merged=True).SerializeToString()
    with write_aside(file) as path:
        path.write_bytes(content)


def read_strategies(path: str | os.PathLike[str]) -> dict[str, dict[int, Placement]]:
    """Where every tensor is, from one strategy file or a folder of them.

    A folder holds for each stage one file or those of all its ranks, which then must be alike; a
    merged file may lie beside them.

    Returns:
        Tensor name -> pipeline stage -> placement.

    Raises:
        UserError: no such file; a file that is empty, cut short or no strategy file; files that
            contradict each other; a stage or a rank without a file.
    """
    files = _strategy_files(Path(path))
    stages: _Stages = {}
    sources: dict[int, list[Path]] = {}
    seen: dict[bytes, _Stages] = {}
    for file in files:
        content = file.read_bytes()
        if content not in seen:
            seen[content] = _read_message(content, file)
        for stage, layouts in seen[content].items():
            sources.setdefault(stage, []).append(file)
            if stages.setdefault(stage, layouts) != layouts:
                _refuse_difference(stages[stage], layouts, sources[stage][0], file, stage)
    devices = _check_stages(stages, str(path))
    for stage, found in sources.items():
        _check_ranks(found, range(stage * devices, (stage + 1) * devices), stage)
    result: dict[str, dict[int, Placement]] = {}
    for stage in sorted(stages):
        for name, placement in stages[stage].items():
            moved = replace(placement, first_rank=stage * devices)
            result.setdefault(name, {})[stage] = moved
    return result


def _by_stage(placements: Placements) -> _Stages:
    stages: _Stages = {}
    for name, by_stage in placements.items():
        if "-" in name:
            raise UserError(
                f"{name!r}: MindSpore reads what stands before a '-' in a strategy file as the "
                "pipeline stage; rename the tensor"
            )
        for stage, placement in by_stage.items():
            stages.setdefault(stage, {})[name] = placement
    devices = _check_stages(stages, "the strategy")
    for stage, name, placement in _each(stages):
        if placement.first_rank != stage * devices:
            raise UserError(
                f"{name}: stage {stage} of {devices} ranks each begins at rank {stage * devices}, "
                f"not {placement.first_rank}"
            )
    return dict(sorted(stages.items()))


def _each(stages: _Stages) -> Iterable[tuple[int, str, Placement]]:
    return ((stage, name, one) for stage in stages for name, one in stages[stage].items())


def _check_stages(stages: _Stages, where: str) -> int:
    """How many ranks a stage has; all must be there and have as many."""
    if missing := sorted(set(range(max(stages, default=0) + 1)) - set(stages)):
        raise UserError(
            f"{where}: nothing is said of pipeline stage {', '.join(map(str, missing))}, but of "
            f"{', '.join(map(str, sorted(stages))) or 'none'}: put the files of all stages together"
        )
    (_, first, example), *rest = _each(stages)
    for stage, name, placement in rest:
        if len(placement.ranks) != len(example.ranks):
            raise UserError(
                f"{where}: {name} of stage {stage} is on {len(placement.ranks)} ranks, but {first} "
                f"of stage {min(stages)} on {len(example.ranks)}: every stage has as many"
            )
    return len(example.ranks)


def _strategy_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such strategy file or folder")
    files = sorted(path.glob("*.ckpt"))
    if not files:
        raise UserError(f"{path}: no strategy file (*.ckpt) is in this folder")
    return files


def _check_ranks(files: list[Path], ranks: range, stage: int) -> None:
    """One file a stage is enough; where more are, one is missing unless all are there."""
    numbered = {int(m[1]): file for file in files if (m := _RANK_FILE.search(file.name))}
    missing = sorted(set(ranks) - set(numbered))
    if len(numbered) > 1 and missing:
        raise UserError(
            f"{files[0].parent}: pipeline stage {stage} has the ranks {ranks[0]} … {ranks[-1]}, "
            f"but the strategy file of rank {', '.join(map(str, missing))} is missing"
        )


def _refuse_difference(
    one: dict[str, Placement], two: dict[str, Placement], first: Path, second: Path, stage: int
) -> None:
    differing = (name for name in {**one, **two} if one.get(name) != two.get(name))
    raise UserError(
        f"{first} and {second} are of the same pipeline stage {stage}, but do not agree on "
        f"{next(differing)}: do not mix the files of two runs"
    )


# MindSpore's messages


def _new_message() -> "ParallelStrategyMap":
    from mindspore.train import node_strategy_pb2  # noqa: PLC0415 - imports all of MindSpore

    return node_strategy_pb2.ParallelStrategyMap()


def _message(stages: _Stages, *, merged: bool) -> "ParallelStrategyMap":
    message = _new_message()
    message.current_stage = min(stages)
    for stage, layouts in stages.items():
        # MindSpore calls a file without such an item empty, and reads the stage from the first one
        item = message.parallel_strategy_item.add()
        item.node_name = f"{len(layouts)} layouts"
        item.parallel_strategys.stage = stage
        item.parallel_strategys.parallel_strategy.add().dim.append(1)
        for name, placement in layouts.items():
            layout = message.parallel_layout_item.add()
            layout.param_name = f"{stage}-{name}" if merged else name
            _fill(layout.parallel_layouts, placement)
    return message


def _fill(layout: "ParallelLayouts", placement: Placement) -> None:
    layout.dev_matrix.add().dim.extend(placement.dev_matrix)
    if max(map(len, placement.tensor_map), default=0) > 1:
        for axes in placement.tensor_map:
            layout.tensor_map.add().dim.extend(axes or (-1,))
        if len(placement.tensor_map) == 1:
            layout.tensor_map.add()  # one message alone would mean one device axis a tensor axis
    else:
        flat = (axes[0] if axes else -1 for axes in placement.tensor_map)
        layout.tensor_map.add().dim.extend(flat)
    layout.param_split_shape.add()
    layout.indices_offset.add()
    layout.field = 0
    sharded = placement.shards > 1
    layout.opt_weight_shard_step = placement.opt_shard_step if sharded else 0
    layout.opt_weight_shard_size = placement.opt_shard_size if sharded else 0


def _read_message(content: bytes, file: Path) -> _Stages:
    message = _new_message()
    try:
        message.ParseFromString(content)
        whole = message.IsInitialized()
    except Exception as error:  # noqa: BLE001 - which one depends on protobuf's implementation
        raise not_as_wanted(file, _WANTED, "it may be cut short") from error
    if not whole or not content:
        raise not_as_wanted(file, _WANTED, "it may be cut short")
    items = message.parallel_layout_item
    if not items:
        raise UserError(f"{file}: this strategy file says of no tensor where it is")
    _check_count(message, file)
    stages: _Stages = {}
    for item in items:
        stage, name = _stage_and_name(item.param_name, message, file)
        if name in stages.setdefault(stage, {}):
            raise UserError(f"{file}: {name} of pipeline stage {stage} is there twice")
        try:
            stages[stage][name] = _placement(item.parallel_layouts)
        except UserError as error:
            raise UserError(f"{file}: {name}: {error}") from error
    return stages


def _check_count(message: "ParallelStrategyMap", file: Path) -> None:
    """Our own files say how many layouts they hold: a cut between two layouts is seen by that."""
    items = message.parallel_strategy_item
    counts = [int(match[1]) for item in items if (match := _COUNT.fullmatch(item.node_name))]
    if counts and len(counts) == len(items):
        expected, found = sum(counts), len(message.parallel_layout_item)
        if found != expected:
            raise UserError(f"{file} is cut short: it holds {found} of {expected} layouts")


def _stage_and_name(name: str, message: "ParallelStrategyMap", file: Path) -> tuple[int, str]:
    if "-" not in name:
        items = message.parallel_strategy_item
        return (items[0].parallel_strategys.stage if items else message.current_stage), name
    merged = _MERGED_NAME.fullmatch(name)
    if merged is None:
        raise UserError(f"{file}: {name!r} is not <pipeline stage>-<tensor name>")
    return int(merged[1]), merged[2]


def _placement(layout: "ParallelLayouts") -> Placement:
    if layout.field or any(one.dim for one in layout.param_split_shape):
        raise UserError("it is cut into uneven parts, which is not supported")
    if len(layout.dev_matrix) != 1 or not layout.tensor_map:
        raise UserError("its layout names no ranks or no axes")
    size, step = layout.opt_weight_shard_size, layout.opt_weight_shard_step
    if not size or not step:  # MindSpore shards only where both say so
        size, step = 0, 0
    return Placement(tuple(layout.dev_matrix[0].dim), _tensor_map(layout.tensor_map), size, step)


def _tensor_map(maps: Any) -> tuple[tuple[int, ...], ...]:
    """One message: a device axis a tensor axis. Several: a message a tensor axis, none empty."""
    if len(maps) == 1:
        return tuple(() if axis == -1 else (axis,) for axis in maps[0].dim)
    filled = (one.dim for one in maps if one.dim)
    return tuple(tuple(axis for axis in axes if axis != -1) for axes in filled)
