"""How many bytes a rank sends in one step, by counting, and which ranks a group spans.

An all-reduce of N bytes over n ranks sends 2 (n - 1) / n N from each of them (ring), half of that
for a gather, a reduce-scatter or an all-to-all. Activations travel in compute_dtype, gradients and
gathered parameters in float32.

Legend: T tokens of a micro batch on a rank, D hidden, K kv heads, d head_dim, k chosen experts.
"""

import math
from collections import Counter
from dataclasses import dataclass, fields

from mixtral_ms.config.derived.expert_grid import exchange_ranks, expert_matrix
from mixtral_ms.config.derived.pipeline_stages import keeps_layer_inputs, layers_per_stage
from mixtral_ms.config.loading.resolve import effective_parallel, is_zero, micro_batches
from mixtral_ms.config.loading.step_choices import step_choices
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.planner.memory_model import (
    NetworkTensors,
    StageValues,
    attention_again,
    dtype_bytes,
    tokens_per_micro_batch,
)

_GRADIENT_BYTES = 4
# Collectives of a layer in one pass.
_REDUCTIONS = 2  # behind attention and behind the experts
_EXCHANGES = 2  # tokens to their experts and back


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank of one pipeline stage sends, by what they are for."""

    tensor_parallel: float
    """All-reduces of activations over model_parallel; a sequence split sends as much."""
    expert_parallel: float
    """All-to-all of tokens over the data-parallel ranks that share the experts."""
    context_parallel: float
    """Keys and values gathered over the sequence, their gradients scattered."""
    pipeline: float
    """Activations to the next stage, gradients to the one before."""
    data_parallel: float
    """Gradients reduced over replicas, and optimizer shards' parameters gathered."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True)
class Group:
    """`size` ranks, `step` apart."""

    size: int
    step: int

    def inside(self, devices: int, per_host: int) -> bool:
        """Whether all such groups of so many devices stay within a host each."""
        return self.size == 1 or devices <= per_host or per_host % (self.size * self.step) == 0

    def share_outside(self, devices: int, per_host: int) -> float:
        """Of a rank's peers, those on other hosts: of the rank that has most of them."""
        if self.inside(devices, per_host):
            return 0.0
        span, fewest = self.size * self.step, self.size
        # groups and hosts fall on each other alike again after so many devices
        for start in range(0, min(devices, math.lcm(span, per_host)), span):
            for first in range(start, start + self.step):
                ranks = range(first, start + span, self.step)
                fewest = min(fewest, *Counter(rank // per_host for rank in ranks).values())
        return (self.size - fewest) / (self.size - 1)


def traffic_groups(grid: ParallelConfig) -> dict[str, tuple[Group, ...]]:
    """The groups over which each kind of `Traffic` goes, by its name.

    Raises:
        UserError: the experts do not divide over the ranks.
    """
    tensor, context = grid.model_parallel, grid.context_parallel
    data = grid.data_parallel * context
    copies, parts, width = expert_matrix(grid)
    return {
        "tensor_parallel": (Group(tensor, 1),),
        "expert_parallel": (Group(exchange_ranks(grid), tensor),),
        "context_parallel": (Group(context, tensor),),
        "pipeline": (Group(grid.pipeline_stage, data * tensor),),
        "data_parallel": (Group(data, tensor), Group(copies, parts * width)),
    }


def traffic_plan(config: RunConfig, tensors: NetworkTensors | None = None) -> list[Traffic]:
    """What a rank of each pipeline stage sends in one optimizer step.

    Args:
        config: the run.
        tensors: those of its network, where many plans are made of it.
    """
    grid = effective_parallel(config)
    tensors = tensors or NetworkTensors(config.model.model_config)
    values = tensors.on_stages(grid, zero=is_zero(config))
    return [
        Traffic(
            tensor_parallel=_tensor_parallel(config, grid, stage),
            expert_parallel=_expert_parallel(config, grid, stage),
            context_parallel=_context_parallel(config, grid, stage),
            pipeline=_pipeline(config, grid, stage),
            data_parallel=_data_parallel(config, grid, stage, one),
        )
        for stage, one in enumerate(values)
    ]


def rows_per_token(config: RunConfig) -> float:
    """Rows of the experts for one token, padding up to the capacity included."""
    moe = config.model.model_config.moe_config
    if moe.dropless:
        return moe.num_experts_chosen
    return min(moe.num_experts_chosen * moe.capacity_factor, moe.expert_num)


def _share(ranks: int) -> float:
    """What of its bytes a rank of a group does not keep to itself."""
    return (ranks - 1) / ranks


def passes(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    """Times that a layer and its collectives run for one micro batch.

    Forwards and backwards; forwards once more where layers are recomputed, as on every stage but
    the last that keeps their inputs; one that keeps its own input only goes forwards once more.
    """
    if keeps_layer_inputs(grid, stage):
        return 3
    return 2 + config.recompute_config.recompute + (stage < grid.pipeline_stage - 1)


def _layers(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    return layers_per_stage(config.model.model_config, grid.pipeline_stage)[stage]


def _hidden_bytes(config: RunConfig) -> float:
    """T D in compute_dtype, for all micro batches of a step."""
    model = config.model.model_config
    width = dtype_bytes(model.compute_dtype, config.context.device_target)
    return micro_batches(config) * tokens_per_micro_batch(config) * model.hidden_size * width


def _tensor_parallel(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    each = _REDUCTIONS * passes(config, grid, stage) + attention_again(config, grid, stage)
    reductions = each * _layers(config, grid, stage)
    if stage == 0 and not grid.vocab_emb_dp:
        reductions += 1  # the embedding's rows
    if stage == grid.pipeline_stage - 1:
        reductions += 1  # the gradient of the head's input
    return 2 * _share(grid.model_parallel) * reductions * _hidden_bytes(config)


def _expert_parallel(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    ranks = traffic_groups(grid)["expert_parallel"][0].size
    exchanges = _EXCHANGES * passes(config, grid, stage) * _layers(config, grid, stage)
    return _share(ranks) * exchanges * rows_per_token(config) * _hidden_bytes(config)


def _context_parallel(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    model = config.model.model_config
    key_value = 2 * model.n_kv_heads * model.head_dim / grid.model_parallel
    own = _hidden_bytes(config) * key_value / model.hidden_size
    return (
        (grid.context_parallel - 1)
        * own
        * (passes(config, grid, stage) + attention_again(config, grid, stage))
        * _layers(config, grid, stage)
    )


def _pipeline(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    neighbours = (stage > 0) + (stage < grid.pipeline_stage - 1)
    cut = grid.model_parallel if grid.use_seq_parallel else 1
    return neighbours * _hidden_bytes(config) / cut


def _data_parallel(
    config: RunConfig, grid: ParallelConfig, stage: int, values: StageValues
) -> float:
    replicas, copies = (group.size for group in traffic_groups(grid)["data_parallel"])
    shared = _share(replicas) * values.trained + _share(copies) * values.trained_experts
    # a reduce-scatter and a gather send as much as an all-reduce
    scattered = micro_batches(config) if step_choices(config).cut_sums else 1
    sent = (1 + scattered) * shared + values.gathered
    return _GRADIENT_BYTES * sent + _tied_embedding(config, grid, stage)


def _tied_embedding(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    """The gradient of an embedding that is also the head, summed over both its stages."""
    model, last = config.model.model_config, grid.pipeline_stage - 1
    trained = model.tie_word_embeddings and model.pet_config is None
    if not trained or last == 0 or stage not in (0, last):
        return 0.0
    cut = 1 if grid.vocab_emb_dp else grid.model_parallel
    return 2 * _share(2) * _GRADIENT_BYTES * model.vocab_size * model.hidden_size / cut
