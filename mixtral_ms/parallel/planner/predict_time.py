"""How long a step of prediction takes, one token of each of some sequences: an estimate.

The model: a device reads the weights that the step meets and the keys and values of the sequences
at the bandwidth of its memory, or computes, whichever takes longer; ranks sum activations, and
nothing of that is hidden.
"""

from dataclasses import dataclass

from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.grid.sharding_rules import active_parameter_count
from mixtral_ms.parallel.planner.memory_model import DTYPE_BYTES
from mixtral_ms.parallel.planner.predict_memory import (
    position_bytes,
    positions_of_cache,
    run_dtypes,
    stored_weights,
)
from mixtral_ms.parallel.planner.time_model import Cluster
from mixtral_ms.parallel.planner.traffic_model import Group

COLLECTIVE_SECONDS = 20e-6
"""Of a collective of a few kilobytes within a host, whatever its size: assumed."""
_REDUCTIONS = 2  # of a layer: behind attention and behind the experts


@dataclass(frozen=True)
class TokenStep:
    """Seconds of a step that gives each of some sequences a token."""

    sequences: int
    context: int
    """Positions that each of them has in the cache."""
    weights: float
    """To read the weights that the step meets, once each."""
    casts: float
    """To write and read again those that are stored in another format than they are computed in."""
    cache: float
    """To read keys and values."""
    compute: float
    """Of the matrix products, hidden behind reading as far as that takes."""
    collectives: float
    """Sums of activations and the parts of the logits."""
    weight_bytes: float
    """What `weights` reads, on the busiest rank."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.weights + self.casts + self.cache, self.compute) + self.collectives

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences / self.seconds

    @property
    def bound_by(self) -> str:
        """The largest term."""
        terms = ("weights", "casts", "cache", "compute", "collectives")
        return max(terms, key=lambda name: getattr(self, name))


def token_step(config: RunConfig, cluster: Cluster, sequences: int) -> TokenStep:
    """What a step of so many sequences takes on an Ascend device."""
    model, grid = config.model.model_config, effective_parallel(config)
    weights, bandwidth = stored_weights(config), cluster.memory_bandwidth
    # a cast knows no choice: it reads and makes all experts
    met = 1.0 if weights.cast else experts_met(config, sequences)
    read = weights.others + weights.experts * met
    context = min(model.seq_length, positions_of_cache(config) // sequences)
    flops = 2 * sequences * active_parameter_count(model) / grid.model_parallel
    return TokenStep(
        sequences=sequences,
        context=context,
        weights=read / bandwidth,
        # written, read to be scaled, written and read
        casts=4 * weights.cast / bandwidth,
        cache=sequences * context * position_bytes(config) / bandwidth,
        compute=flops / (cluster.flops * cluster.efficiency),
        collectives=_collective_seconds(config, cluster, sequences),
        weight_bytes=read,
    )


def experts_met(config: RunConfig, sequences: int) -> float:
    """Share of its experts that the busiest rank meets, where routing is even."""
    model, grid = config.model.model_config, effective_parallel(config)
    moe = model.moe_config
    share = 1 - (1 - min(1.0, moe.num_experts_chosen / moe.expert_num)) ** sequences
    # a token's expert is on some rank whole, however many ranks there are
    return max(share, grid.expert_parallel / moe.expert_num)


def assumptions(cluster: Cluster) -> list[str]:
    """What the estimate takes for granted, a line each."""
    return [
        f"weights and cache are read at {cluster.memory_bandwidth / 1e9:,.0f} GB/s, each weight "
        "once a step, of the experts those that a token chose; routing is even",
        "products run at "
        f"{cluster.efficiency:.0%} of {cluster.flops / 1e12:,.0f} TFLOP/s behind that reading",
        f"a collective takes {COLLECTIVE_SECONDS * 1e6:.0f} us and its bytes at "
        f"{cluster.bandwidth_inside / 1e9:,.0f} GB/s inside a host, "
        f"{cluster.bandwidth_between / 1e9:,.0f} between hosts; nothing hides it",
        "every sequence is as long as the context and the cache allow; launches of operators, "
        "sampling on the host and prompts are not counted",
    ]


def _collective_seconds(config: RunConfig, cluster: Cluster, sequences: int) -> float:
    model, grid = config.model.model_config, effective_parallel(config)
    ranks = grid.model_parallel * grid.data_parallel
    if ranks == 1:
        return 0.0
    inside = Group(ranks, 1).inside(cluster.devices, cluster.devices_per_host)
    rate = cluster.bandwidth_inside if inside else cluster.bandwidth_between
    hidden = sequences * model.hidden_size * DTYPE_BYTES[run_dtypes(config).products]
    reduction = COLLECTIVE_SECONDS + 2 * (ranks - 1) / ranks * hidden / rate
    logits = sequences * model.vocab_size * DTYPE_BYTES[run_dtypes(config).products]
    gather = COLLECTIVE_SECONDS + (ranks - 1) / ranks * logits / rate
    return _REDUCTIONS * model.num_layers * reduction + gather
