"""Which rank grids fit a cluster, and how fast an analytic model says each of them is.

Memory is counted (`memory_model`) and so are the bytes sent (`traffic_model`); time is an estimate
(`time_model`).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mixtral_ms.config.checks.check_config import find_contradictions
from mixtral_ms.config.derived.expert_grid import exchange_ranks
from mixtral_ms.config.loading.resolve import (
    micro_batch_size,
    micro_batches,
    sequences_per_micro_step,
)
from mixtral_ms.config.loading.step_choices import step_choices
from mixtral_ms.config.sections.model_section import MoEConfig
from mixtral_ms.config.sections.parallel_section import GRID_SIZES, ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.planner.memory_model import NetworkTensors, RankMemory, memory_plan
from mixtral_ms.parallel.planner.time_model import Cluster, Time, step_time
from mixtral_ms.parallel.planner.traffic_model import Traffic, traffic_plan

_PARTS = ("parameters", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Layout:
    """A run on a rank grid, with what it needs."""

    config: RunConfig
    memory: tuple[RankMemory, ...]
    traffic: tuple[Traffic, ...]
    time: Time

    @property
    def fullest(self) -> RankMemory:
        """The stage whose ranks need the most memory."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def most_sent(self) -> Traffic:
        """The stage whose ranks send the most."""
        return max(self.traffic, key=lambda traffic: traffic.total)

    @property
    def micro_batches(self) -> int:
        """Micro batches that a rank sees in one step."""
        return micro_batches(self.config)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        tokens = _global_batch_size(self.config) * self.config.model.model_config.seq_length
        return tokens / self.time.step

    def largest_part(self) -> tuple[str, int]:
        """What takes most of the fullest stage's memory, and its bytes."""
        name = max(_PARTS, key=lambda part: getattr(self.fullest, part))
        return name, getattr(self.fullest, name)


@dataclass(frozen=True)
class LayoutPlan:
    """All rank grids of a cluster, judged."""

    fitting: tuple[Layout, ...]
    """The best variant of each grid that fits, the fastest first."""
    too_large: tuple[Layout, ...]
    """The smallest variant of each other grid, the one nearest to fitting first."""
    refused: Mapping[str, int]
    """Why grids contradict the network or the batch, and how many do; the most frequent first."""


def plan_layouts(
    config: RunConfig,
    cluster: Cluster,
    token_flops: Mapping[str, float],
    *,
    global_batch_size: int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> LayoutPlan:
    """Judge every grid of data, model, pipeline, context and expert parallel.

    Of each grid the variants with and without optimizer sharding, sequence parallel and recompute
    are tried. The micro batch stays as it is; their number follows from the global batch.

    Args:
        config: a training run; its own grid does not matter.
        cluster: the devices.
        token_flops: FLOPs to train on one token: "total" and, in it, "experts" and "lm_head".
        global_batch_size: sequences of one step over all ranks; None for the configuration's.
        fixed: sizes of parallel_config that a grid must have, by their keys.
    """
    sequences = global_batch_size or _global_batch_size(config)
    tensors = NetworkTensors(config.model.model_config)
    fitting, too_large = [], []
    refused: Counter[str] = Counter()
    for grid in _grids(config, cluster.devices):
        if any(getattr(grid, key) != size for key, size in (fixed or {}).items()):
            continue
        base = _on_grid(config, replace(grid, use_seq_parallel=False), sequences)
        if base is None:
            refused[_batch_problem(config, grid, sequences)] += 1
            continue
        if problems := find_contradictions(base):
            refused[problems[0]] += 1
            continue
        layouts = [
            judge(variant, cluster, token_flops, tensors=tensors) for variant in _variants(base)
        ]
        fits = [layout for layout in layouts if layout.fullest.total <= cluster.memory]
        if fits:
            best = [_with_best_exchange(layout, cluster, token_flops) for layout in fits]
            fitting.append(min(best, key=_slowness))
        else:
            too_large.append(min(layouts, key=lambda layout: layout.fullest.total))
    return LayoutPlan(
        fitting=tuple(sorted(fitting, key=_slowness)),
        too_large=tuple(sorted(too_large, key=lambda layout: layout.fullest.total)),
        refused=dict(refused.most_common()),
    )


def judge(
    config: RunConfig,
    cluster: Cluster,
    token_flops: Mapping[str, float],
    *,
    tensors: NetworkTensors | None = None,
) -> Layout:
    """Memory, bytes sent and time of a run that contradicts nothing."""
    memory = tuple(memory_plan(config, tensors))
    traffic = tuple(traffic_plan(config, tensors))
    return Layout(config, memory, traffic, step_time(config, cluster, token_flops, memory, traffic))


def sections(layout: Layout) -> dict[str, dict[str, Any]]:
    """The sections of a YAML that make a run use this layout, by their names."""
    config = layout.config
    grid, runner = config.parallel_config, config.runner_config
    return {
        "runner_config": {
            "batch_size": runner.batch_size,
            "global_batch_size": runner.global_batch_size,
            "gradient_accumulation_steps": runner.gradient_accumulation_steps,
        },
        "parallel_config": {
            name: getattr(grid, name)
            for name in (
                *GRID_SIZES.values(),
                "micro_batch_num",
                "use_seq_parallel",
                "vocab_emb_dp",
            )
        },
        "parallel": {"enable_parallel_optimizer": config.parallel.enable_parallel_optimizer},
        "recompute_config": {
            name: getattr(config.recompute_config, name)
            for name in ("recompute", "select_recompute")
        },
        "moe_config": {
            name: getattr(config.moe_config, name)
            for name in ("comp_comm_parallel", "comp_comm_parallel_degree")
        },
        "runner_wrapper": {"working_weights": config.runner_wrapper.working_weights},
    }


def _global_batch_size(config: RunConfig) -> int:
    return sequences_per_micro_step(config) * config.runner_config.gradient_accumulation_steps


def _slowness(layout: Layout) -> tuple[float, int]:
    return layout.time.step, layout.fullest.total


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _grids(config: RunConfig, devices: int) -> Iterator[ParallelConfig]:
    """Every grid of so many devices whose experts divide."""
    experts = _divisors(config.model.model_config.moe_config.expert_num)
    for tensor in _divisors(devices):
        for stages in _divisors(devices // tensor):
            for context in _divisors(devices // tensor // stages):
                data = devices // tensor // stages // context
                for parts in experts:
                    if parts <= data * context * tensor:
                        yield replace(
                            config.parallel_config,
                            data_parallel=data,
                            model_parallel=tensor,
                            expert_parallel=parts,
                            pipeline_stage=stages,
                            context_parallel=context,
                        )


def _on_grid(config: RunConfig, grid: ParallelConfig, sequences: int) -> RunConfig | None:
    """The run on a grid with `sequences` in a step; None where they do not divide."""
    runner = config.runner_config
    batches, rest = divmod(sequences, micro_batch_size(config) * grid.data_parallel)
    if rest or not batches:
        return None
    in_pipeline = grid.pipeline_stage > 1
    return replace(
        config,
        use_parallel=True,
        parallel_config=replace(grid, micro_batch_num=batches if in_pipeline else 1),
        runner_config=replace(
            runner,
            global_batch_size=sequences,
            gradient_accumulation_steps=1 if in_pipeline else batches,
        ),
    )


def _batch_problem(config: RunConfig, grid: ParallelConfig, sequences: int) -> str:
    return (
        f"a global batch of {sequences} sequences is not divisible by runner_config.batch_size "
        f"{config.runner_config.batch_size} * data_parallel {grid.data_parallel}"
    )


def _variants(base: RunConfig) -> Iterator[RunConfig]:
    """With and without what saves memory for time, or time for memory, where it acts."""
    grid, again = base.parallel_config, base.recompute_config
    ranks = grid.data_parallel * grid.context_parallel * grid.model_parallel
    shards = (False, True) if ranks > 1 else (False,)  # norms are alike on all of a stage
    recomputes = [
        replace(again, recompute=False, select_recompute=False),
        replace(again, recompute=False, select_recompute=True),
        replace(again, recompute=True, select_recompute=False),
    ]
    for sequence in _sequence_splits(base):
        for shard, recompute, working in itertools.product(
            shards, recomputes, _working_weights(base)
        ):
            yield replace(
                base,
                parallel_config=replace(grid, use_seq_parallel=sequence),
                parallel=replace(base.parallel, enable_parallel_optimizer=shard),
                recompute_config=recompute,
                runner_wrapper=replace(base.runner_wrapper, working_weights=working),
            )


def _exchanges(base: RunConfig) -> Iterable[MoEConfig]:
    """The experts' exchange as a whole, in the YAML's parts and in others, where it can be."""
    moe = base.model.model_config.moe_config
    if moe.dropless or exchange_ranks(base.parallel_config) == 1:
        return (moe,)
    degrees = sorted({2, 4, moe.comp_comm_parallel_degree})
    in_parts = [
        replace(moe, comp_comm_parallel=True, comp_comm_parallel_degree=one) for one in degrees
    ]
    return [replace(moe, comp_comm_parallel=False), *in_parts]


def _with_best_exchange(
    layout: Layout, cluster: Cluster, token_flops: Mapping[str, float]
) -> Layout:
    """In the number of parts that is fastest; memory and bytes sent are those of one."""
    config, found = layout.config, []
    for moe in _exchanges(config):
        network = replace(config.model.model_config, moe_config=moe)
        run = replace(config, model=replace(config.model, model_config=network), moe_config=moe)
        time = step_time(run, cluster, token_flops, layout.memory, layout.traffic)
        found.append(replace(layout, config=run, time=time))
    return min(found, key=_slowness)


def _working_weights(base: RunConfig) -> Iterable[bool | None]:
    """Both ways, where there is something to cast."""
    wanted = replace(base, runner_wrapper=replace(base.runner_wrapper, working_weights=True))
    on_device = base.context.device_target != "CPU"
    return (True, False) if on_device and step_choices(wanted).working_weights else (None,)


def _sequence_splits(base: RunConfig) -> Iterable[bool]:
    if base.parallel_config.model_parallel == 1:
        return (False,)
    split = replace(base, parallel_config=replace(base.parallel_config, use_seq_parallel=True))
    return (False,) if find_contradictions(split) else (False, True)
