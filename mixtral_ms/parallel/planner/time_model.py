"""How long a step takes on a cluster, estimated from what is counted.

The model: matrix products at a share of the device's peak, the weights' way to and from memory for
every micro batch, and every byte sent at the speed of the slowest link of its group, with nothing
hidden behind anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.loading.resolve import micro_batches, rank_count
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.planner.memory_model import (
    PARAMETER_BYTES,
    RankMemory,
    tokens_per_micro_batch,
)
from mixtral_ms.parallel.planner.traffic_model import (
    Traffic,
    passes,
    rows_per_token,
    traffic_groups,
)

# Memory traffic of a weight in one pass of a micro batch: float32 read, a 16 bit copy written and
# read; and in the backward pass its gradient written, then added to the float32 sum.
_BYTES_PER_PASS, _BYTES_OF_GRADIENT = 8, 12


@dataclass(frozen=True)
class Cluster:
    """The devices."""

    devices: int
    memory: float
    """Bytes of one device that a run may use."""
    devices_per_host: int = 8
    flops: float = 320e12
    """Peak of one device in FLOP/s."""
    efficiency: float = 0.4
    """Share of the peak that is reached."""
    memory_bandwidth: float = 1.6e12
    """Bytes a second between a device and its memory."""
    bandwidth_inside: float = 150e9
    """Bytes a second that a device sends to others of its host."""
    bandwidth_between: float = 25e9
    """Bytes a second that a device sends to other hosts."""


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step, estimated."""

    compute: float
    """Of the stage that computes longest, for all its micro batches."""
    communication: float
    """Of the stage that sends longest; nothing is hidden behind computing."""
    step: float
    """All of it, idle stages included."""
    bubble: float
    """Share of the pipeline's time in which a stage stands idle, on average."""


def step_time(
    config: RunConfig,
    cluster: Cluster,
    token_flops: Mapping[str, float],
    memory: Sequence[RankMemory],
    traffic: Sequence[Traffic],
) -> Time:
    """Seconds of one optimizer step.

    Args:
        config: the run.
        cluster: its devices.
        token_flops: FLOPs to train on one token: "total" and, in it, "experts" and "lm_head".
        memory: of each stage's ranks.
        traffic: of each stage's ranks.
    """
    count = micro_batches(config)
    compute = _compute_seconds(config, cluster, token_flops, memory)
    sending = [_sending_seconds(config, cluster, one) for one in traffic]
    at_end = [seconds.pop("data_parallel") for seconds in sending]
    each = [
        once + sum(seconds.values()) / count for once, seconds in zip(compute, sending, strict=True)
    ]
    # 1F1B: the slowest stage sets the pace, and the first micro batch passes through all stages
    pipeline = (count - 1) * max(each) + sum(each)
    return Time(
        compute=count * max(compute),
        communication=max(
            sum(seconds.values()) + end for seconds, end in zip(sending, at_end, strict=True)
        ),
        step=pipeline + max(at_end),
        bubble=max(0.0, 1 - count * sum(each) / len(each) / pipeline),
    )


def _compute_seconds(
    config: RunConfig,
    cluster: Cluster,
    token_flops: Mapping[str, float],
    memory: Sequence[RankMemory],
) -> list[float]:
    """Of each stage, for one micro batch: products, and the weights' way to and from memory."""
    model, grid = config.model.model_config, config.parallel_config
    padded = rows_per_token(config) / model.moe_config.num_experts_chosen
    layers = token_flops["total"] - token_flops["lm_head"]
    layers += token_flops["experts"] * (padded - 1)
    rate = cluster.flops * cluster.efficiency * grid.model_parallel
    tokens = tokens_per_micro_batch(config)
    counts = layers_per_stage(model, grid.pipeline_stage)
    repeats = [passes(config, grid, stage) for stage in range(len(counts))]
    # of six FLOPs two are forwards: a pass more than two is a third more
    flops = [
        layers * count / model.num_layers * (1 + times) / 3
        for count, times in zip(counts, repeats, strict=True)
    ]
    flops[-1] += token_flops["lm_head"]
    moved = [
        (times * _BYTES_PER_PASS * rank.parameters + _BYTES_OF_GRADIENT * rank.gradients)
        / PARAMETER_BYTES
        for rank, times in zip(memory, repeats, strict=True)
    ]
    return [
        tokens * of_stage / rate + size / cluster.memory_bandwidth
        for of_stage, size in zip(flops, moved, strict=True)
    ]


def _sending_seconds(config: RunConfig, cluster: Cluster, traffic: Traffic) -> dict[str, float]:
    """Of one stage in one step, by what is sent."""
    devices, per_host = rank_count(config), cluster.devices_per_host
    seconds = {}
    for kind, spanned in traffic_groups(config.parallel_config).items():
        inside = all(group.inside(devices, per_host) for group in spanned)
        rate = cluster.bandwidth_inside if inside else cluster.bandwidth_between
        seconds[kind] = getattr(traffic, kind) / rate
    return seconds
