"""How long a step takes on a cluster, estimated from what is counted.

The model: matrix products at a share of the device's peak, the weights' way to and from memory for
every micro batch, and every byte sent at the speed of the slowest link of its group; an all-to-all
takes the links that each of its messages needs. Nothing is hidden behind anything but the experts'
exchange in parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.loading.resolve import micro_batches, rank_count
from mixtral_ms.config.loading.step_choices import step_choices
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.planner.memory_model import (
    PARAMETER_BYTES,
    RankMemory,
    attention_again,
    tokens_per_micro_batch,
)
from mixtral_ms.parallel.planner.traffic_model import (
    Group,
    Traffic,
    passes,
    rows_per_token,
    traffic_groups,
)

# Memory traffic of a weight, bytes: to read float32 and write the 16 bit copy; to read the copy, in
# each pass of a micro batch; in the backward pass to write its gradient and add it to the sum. And
# of an expert's that computes its tokens in parts: to write and add up the gradients of one more.
_CAST, _READ, _GRADIENT, _GRADIENT_OF_PART = 6, 2, 12, 6

ONCE_A_STEP = "data_parallel"
"""The kind of traffic that follows the last micro batch."""


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

    step: float
    """All of it."""
    bubble: float
    """Share of the pipeline's time in which a stage stands idle, on average."""
    exposed: Mapping[str, float]
    """What the step is made of, on the stage that takes longest: "products", "weights" (their way
    to and from memory), what is sent and not hidden, by its name in `Traffic`, and "waiting" for
    the other stages."""
    hidden: Mapping[str, float]
    """What is sent behind computing, by its name in `Traffic`."""


@dataclass(frozen=True)
class _Computing:
    """Seconds of one micro batch on one stage."""

    products: float
    """Matrix products and attention."""
    experts: float
    """Of these, the experts' products."""
    weights: float
    """The weights' way to and from memory."""


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
    sent = [_sending_seconds(config, cluster, one) for one in traffic]
    reduction = max(seconds.pop(ONCE_A_STEP) for seconds in sent)
    computed = _computing(config, cluster, token_flops, memory)
    exposed, hidden = zip(
        *(
            _micro_batch(config, computing, {kind: each / count for kind, each in seconds.items()})
            for computing, seconds in zip(computed, sent, strict=True)
        ),
        strict=True,
    )
    each = [sum(one.values()) for one in exposed]
    slowest = each.index(max(each))
    # 1F1B: the slowest stage sets the pace, and the first micro batch passes through all stages
    pipeline = (count - 1) * max(each) + sum(each)
    parts = {name: count * seconds for name, seconds in exposed[slowest].items()}
    return Time(
        step=pipeline + reduction,
        bubble=max(0.0, 1 - count * sum(each) / len(each) / pipeline),
        exposed={**parts, "waiting": sum(each) - max(each), ONCE_A_STEP: reduction},
        hidden={name: count * seconds for name, seconds in hidden[slowest].items()},
    )


def _micro_batch(
    config: RunConfig, computing: _Computing, sending: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that a micro batch takes on a stage, and those of sending that it hides."""
    exchange = sending["expert_parallel"]
    shown = _exposed_exchange(config, exchange, computing.experts)
    exposed = {"products": computing.products, "weights": computing.weights, **sending}
    return exposed | {"expert_parallel": shown}, {"expert_parallel": exchange - shown}


def _exposed_exchange(config: RunConfig, exchange: float, products: float) -> float:
    """What of the experts' exchange nothing hides.

    In n parts, one part is exchanged while the next is computed: the first part's way there and
    the last one's way back are always waited for, and so is what takes longer than the products.
    """
    first = 1 / config.model.model_config.moe_config.exchange_parts
    return exchange * first + max(0.0, exchange - products) * (1 - first)


def _computing(
    config: RunConfig,
    cluster: Cluster,
    token_flops: Mapping[str, float],
    memory: Sequence[RankMemory],
) -> list[_Computing]:
    """Of each stage, for one micro batch."""
    model, grid = config.model.model_config, config.parallel_config
    padded = rows_per_token(config) / model.moe_config.num_experts_chosen
    experts = token_flops["experts"] * padded
    others = token_flops["total"] - token_flops["lm_head"] - token_flops["experts"]
    seconds = tokens_per_micro_batch(config) / (
        cluster.flops * cluster.efficiency * grid.model_parallel
    )
    found = []
    for stage, layers in enumerate(layers_per_stage(model, grid.pipeline_stage)):
        times, again = passes(config, grid, stage), attention_again(config, grid, stage)
        # of six FLOPs two are forwards: a pass more than two is a third more
        part = layers / model.num_layers / 3
        share = part * (1 + times)
        head = token_flops["lm_head"] * (stage == grid.pipeline_stage - 1)
        found.append(
            _Computing(
                products=seconds * ((experts + others) * share + others * part * again + head),
                experts=seconds * experts * share,
                weights=_moved(config, memory[stage], times) / cluster.memory_bandwidth,
            )
        )
    return found


def _moved(config: RunConfig, rank: RankMemory, times: int) -> float:
    """Bytes between a device and its memory for the weights of one micro batch."""
    values = rank.masters / PARAMETER_BYTES
    # working weights are cast once a step: a part of that counts for each micro batch
    casts = 1 / micro_batches(config) if step_choices(config).working_weights else times
    gradients = rank.gradients / PARAMETER_BYTES
    moved = (casts * _CAST + times * _READ) * values + _GRADIENT * gradients
    more_parts = config.model.model_config.moe_config.exchange_parts - 1
    experts = rank.experts / PARAMETER_BYTES
    return moved + more_parts * (times * _READ + _GRADIENT_OF_PART) * experts


def _sending_seconds(config: RunConfig, cluster: Cluster, traffic: Traffic) -> dict[str, float]:
    """Of one stage in one step, by what is sent."""
    seconds = {}
    for kind, spanned in traffic_groups(config.parallel_config).items():
        sent = getattr(traffic, kind)
        if kind == "expert_parallel":
            seconds[kind] = _all_to_all_seconds(config, cluster, sent, spanned[0])
            continue
        devices, per_host = rank_count(config), cluster.devices_per_host
        inside = all(group.inside(devices, per_host) for group in spanned)
        seconds[kind] = sent / (cluster.bandwidth_inside if inside else cluster.bandwidth_between)
    return seconds


def _all_to_all_seconds(config: RunConfig, cluster: Cluster, sent: float, group: Group) -> float:
    """Each pair of ranks has its own message: those within a host take the links within it."""
    outside = group.share_outside(rank_count(config), cluster.devices_per_host)
    return max(
        sent * outside / cluster.bandwidth_between,
        sent * (1 - outside) / cluster.bandwidth_inside,
    )
