"""Which rank grids and weight formats let a run answer on a cluster, and how fast: estimates."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

from mixtral_ms.config.checks.check_config import find_contradictions
from mixtral_ms.config.derived.prediction import prediction_batch
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.planner.predict_memory import PredictMemory, predict_memory
from mixtral_ms.parallel.planner.predict_time import TokenStep, token_step
from mixtral_ms.parallel.planner.time_model import Cluster


@dataclass(frozen=True)
class PredictLayout:
    """A run that answers, on a rank grid, with its weights in a format."""

    config: RunConfig
    memory: PredictMemory
    alone: TokenStep
    """One sequence."""
    batch: TokenStep
    """As many as are answered at once."""


@dataclass(frozen=True)
class PredictPlan:
    """All grids and formats, judged."""

    fitting: tuple[PredictLayout, ...]
    """The fastest for a whole batch first."""
    too_large: tuple[PredictLayout, ...]
    """The one nearest to fitting first."""
    refused: Mapping[str, int]
    """Why grids contradict the network, and how many do."""


def plan_prediction(
    config: RunConfig, cluster: Cluster, fixed: Mapping[str, int] | None = None
) -> PredictPlan:
    """Judge every grid of model and expert parallel, with every weight_dtype.

    Args:
        config: a run that answers; its own grid and weight_dtype do not matter.
        cluster: the devices.
        fixed: sizes of parallel_config that a grid must have, by their keys.
    """
    layouts: list[PredictLayout] = []
    refused: Counter[str] = Counter()
    for grid in _grids(config, cluster.devices):
        if any(getattr(grid, key) != size for key, size in (fixed or {}).items()):
            continue
        on_grid = replace(config, use_parallel=cluster.devices > 1, parallel_config=grid)
        if problems := find_contradictions(on_grid):
            refused[problems[0]] += 1
            continue
        for weight_dtype in get_args(get_type_hints(RunConfig)["weight_dtype"]):
            layouts.append(judge_prediction(replace(on_grid, weight_dtype=weight_dtype), cluster))
    fits = [one for one in layouts if one.memory.total <= cluster.memory]
    others = [one for one in layouts if one.memory.total > cluster.memory]
    return PredictPlan(
        fitting=tuple(sorted(fits, key=lambda one: one.batch.seconds)),
        too_large=tuple(sorted(others, key=lambda one: one.memory.total)),
        refused=dict(refused.most_common()),
    )


def judge_prediction(config: RunConfig, cluster: Cluster) -> PredictLayout:
    """Memory and time of a run that contradicts nothing."""
    return PredictLayout(
        config,
        predict_memory(config),
        token_step(config, cluster, 1),
        token_step(config, cluster, prediction_batch(config)),
    )


def _grids(config: RunConfig, devices: int) -> Iterator[ParallelConfig]:
    """Tensor-parallel ranks, and data-parallel ones where these hold experts."""
    experts = config.model.model_config.moe_config.expert_num
    for tensor in (size for size in range(1, devices + 1) if devices % size == 0):
        data = devices // tensor
        for parts in (size for size in range(1, experts + 1) if experts % size == 0):
            if parts % data == 0 and parts <= devices:
                yield replace(
                    config.parallel_config,
                    data_parallel=data,
                    model_parallel=tensor,
                    expert_parallel=parts,
                    pipeline_stage=1,
                    context_parallel=1,
                )
