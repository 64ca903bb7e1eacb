"""How much memory a rank needs, by counting: an estimate made before anything is built.

Parameters, gradients and both moments are float32; activations and working weights have
compute_dtype. Which values a rank holds is read off the layout table, optimizer shards included.

Legend: T tokens of a micro batch, D hidden, H heads, K kv heads, d head_dim, F intermediate,
E experts, V vocabulary, S sequence.
"""

import math
from collections import Counter
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from mixtral_ms.config.derived.expert_grid import exchange_ranks, expert_matrix
from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.config.derived.pipeline_stages import keeps_layer_inputs, layers_per_stage
from mixtral_ms.config.derived.recomputed_layers import selected_layers
from mixtral_ms.config.loading.resolve import effective_parallel, is_zero, micro_batches
from mixtral_ms.config.loading.step_choices import step_choices
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.grid.sharding_rules import (
    MOMENTS,
    adapter_shapes,
    local_shape,
    parameter_shapes,
    placements,
    stages_of,
)

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
PARAMETER_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    ranks: int
    """How many ranks look like this one."""
    parameters: int
    """In float32, and their working weights."""
    masters: int
    """Of these, those in float32."""
    experts: int
    """Of those, the experts' matrices."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass; in prediction the cache."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class StageValues:
    """How many values a rank of one pipeline stage holds."""

    parameters: int
    """Of all parameters."""
    trained: int
    """Of those that are trained, outside the experts: all of them, or adapters alone."""
    trained_experts: int
    """Of the experts' parameters that are trained."""
    moments: int
    """Of both optimizer moments."""
    cut: int
    """Of one of the moments, of those tensors whose moments are cut over replicas."""
    gathered: int
    """Outside the experts, of tensors that tensor-parallel ranks hold too and whose moments are
    therefore cut over more ranks than sum their gradients: what the other ranks update."""
    matrices: int
    """Of those parameters that are cast before they are used: they may have working weights."""
    experts: int
    """Of the experts' matrices, trained or not."""


class NetworkTensors:
    """The tensors of a network, counted once for many rank grids.

    Layers are alike, so a tensor and its name are looked up in the layout table once for all of
    them.
    """

    def __init__(self, model: MixtralConfig) -> None:
        self.model = model
        adapters = adapter_shapes(model)
        self._shapes = parameter_shapes(model) | adapters
        self._trained = set(adapters or self._shapes)
        kinds: dict[str, str] = {}
        self._alike = {name: kinds.setdefault(row_of(name).name, name) for name in self._shapes}
        self._counted: dict[int, list[Counter[str]]] = {}
        self._sized: dict[tuple, dict[str, _Sizes]] = {}

    def on_stages(self, grid: ParallelConfig, *, zero: bool) -> list[StageValues]:
        """How many values a rank of each stage holds.

        Args:
            grid: sizes of the rank grid.
            zero: whether optimizer moments are cut over their replicas.

        Raises:
            UserError: a tensor does not divide, or the layers over the stages.
        """
        one_stage = replace(grid, pipeline_stage=1)  # a tensor is cut alike on every stage
        key = (*astuple(one_stage), zero)
        if key not in self._sized:
            self._sized[key] = self._sizes(one_stage, zero=zero)
        return [self._sum(stage, self._sized[key]) for stage in self._count(grid.pipeline_stage)]

    def _count(self, stages: int) -> list[Counter[str]]:
        """For each stage, how many tensors there are of each kind, by the first of its names."""
        if stages not in self._counted:
            counted: list[Counter[str]] = [Counter() for _ in range(stages)]
            for name in self._shapes:
                for stage in stages_of(name, self.model, stages):
                    counted[stage][self._alike[name]] += 1
            self._counted[stages] = counted
        return self._counted[stages]

    def _sizes(self, grid: ParallelConfig, *, zero: bool) -> dict[str, "_Sizes"]:
        """What a rank holds of each kind of tensor."""
        first, _ = MOMENTS  # both are cut alike
        names = dict.fromkeys(self._alike.values())
        by_name = placements(self.model, grid, [first + name for name in names], zero=zero)
        sizes = {}
        for name in names:
            shape, placement = self._shapes[name], by_name[first + name][0]
            moment = math.prod(placement.local_shape(shape))
            values = math.prod(local_shape(name, shape, grid))
            wider = placement.shards > grid.data_parallel * grid.context_parallel
            gathered = values - moment if wider else 0
            sizes[name] = _Sizes(values, moment, moment if placement.shards > 1 else 0, gathered)
        return sizes

    def _sum(self, counted: Counter[str], sizes: dict[str, "_Sizes"]) -> StageValues:
        parameters = trained = trained_experts = moments = cut = gathered = matrices = experts = 0
        for name, count in counted.items():
            one, row = sizes[name], row_of(name)
            parameters += count * one.values
            matrices += count * one.values * row.is_cast
            experts += count * one.values * (row.expert_axis is not None)
            if name not in self._trained:
                continue
            moments += 2 * count * one.moment
            cut += count * one.cut
            if row.expert_axis is None:
                trained += count * one.values
                gathered += count * one.gathered
            else:
                trained_experts += count * one.values
        return StageValues(
            parameters, trained, trained_experts, moments, cut, gathered, matrices, experts
        )


class _Sizes(NamedTuple):
    """How many values of one tensor a rank holds, of one of its moments, and see `StageValues`."""

    values: int
    moment: int
    cut: int
    gathered: int


def dtype_bytes(dtype: str, device_target: str) -> int:
    """Bytes of one value; a CPU computes bfloat16 as float32."""
    return 4 if device_target == "CPU" and dtype == "bfloat16" else DTYPE_BYTES[dtype]


def memory_plan(config: RunConfig, tensors: NetworkTensors | None = None) -> list[RankMemory]:
    """What each pipeline stage's ranks hold, one entry a stage.

    Args:
        config: the run.
        tensors: those of its network, where many plans are made of it.
    """
    grid = effective_parallel(config)
    tensors = tensors or NetworkTensors(config.model.model_config)
    return [
        _stage_memory(config, grid, stage, values)
        for stage, values in enumerate(tensors.on_stages(grid, zero=is_zero(config)))
    ]


def format_memory_plan(plan: list[RankMemory]) -> str:
    """The plan as a small table, one line a stage."""
    columns = ("parameters", "gradients", "optimizer", "activations", "total")
    lines = ["stage  ranks" + "".join(f"{name:>13}" for name in columns)]
    for rank in plan:
        sizes = "".join(f"{format_bytes(getattr(rank, name)):>13}" for name in columns)
        lines.append(f"{rank.stage:>5}  {rank.ranks:>5}{sizes}")
    return "\n".join(lines)


def format_bytes(size: int) -> str:
    """A size for people: binary units, three digits or so."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _stage_memory(
    config: RunConfig, grid: ParallelConfig, stage: int, values: StageValues
) -> RankMemory:
    training, choices = config.mode.trains, step_choices(config)
    sums = values.trained + values.trained_experts
    if choices.cut_sums:
        sums = values.moments // 2
    elif micro_batches(config) > 1:
        # The parts that cut moments are of stand beside the sums of several micro batches.
        sums += values.cut
    working = values.matrices if training and choices.working_weights else 0
    narrow = dtype_bytes(config.model.model_config.compute_dtype, config.context.device_target)
    return RankMemory(
        stage=stage,
        ranks=grid.data_parallel * grid.model_parallel * grid.context_parallel,
        parameters=PARAMETER_BYTES * values.parameters + narrow * working,
        masters=PARAMETER_BYTES * values.parameters,
        experts=PARAMETER_BYTES * values.experts,
        gradients=PARAMETER_BYTES * sums if training else 0,
        optimizer=PARAMETER_BYTES * values.moments if training else 0,
        activations=(
            _activation_bytes(config, grid, stage)
            if training
            else _cache_bytes(config, grid, stage)
        ),
    )


def _activation_bytes(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    model = config.model.model_config
    width = dtype_bytes(model.compute_dtype, config.context.device_target)
    tokens = tokens_per_micro_batch(config)
    layers = layers_per_stage(model, grid.pipeline_stage)[stage]
    fused = config.context.device_target == "Ascend"
    layer_input = tokens * _hidden(model, grid) * width
    attention = tokens * _attention_values(model, grid, fused=fused) * width
    per_layer = attention + tokens * _expert_values(model, grid) * width
    kept = per_layer * layers
    # of a layer whose attention and norms are computed again stay what the three were given
    again = round(attention_again(config, grid, stage) * layers)
    kept -= max(0, again - 1) * max(0, attention - 3 * layer_input)
    routing = tokens * 2 * model.moe_config.expert_num * 4  # float32
    own_inputs = keeps_layer_inputs(grid, stage)
    if config.recompute_config.recompute or own_inputs:
        # layers' inputs stay, and what the router's losses read; one layer at a time is redone
        kept = (layer_input + routing) * (layers - 1) + per_layer
    # 1F1B: the first stage has as many micro batches under way as there are stages, and keeps of
    # all but the one that is computed the layers' inputs, or its own input only
    under_way = min(grid.pipeline_stage - stage, max(grid.micro_batch_num, 1))
    waiting = (layer_input + routing) * layers if own_inputs else layer_input
    kept += waiting * (under_way - 1)
    if stage == grid.pipeline_stage - 1:  # float32 logits and their gradient
        kept += 2 * 4 * tokens * model.vocab_size // grid.model_parallel
    return kept


def _hidden(model: MixtralConfig, grid: ParallelConfig) -> int:
    """Width of the residual stream on one rank, were it cut there."""
    return model.hidden_size // (grid.model_parallel if grid.use_seq_parallel else 1)


def _attention_values(model: MixtralConfig, grid: ParallelConfig, *, fused: bool) -> int:
    """Values a layer's attention and norms keep for the backward pass, for one token.

    Fused attention (Ascend) does not keep the S x S probabilities.
    """
    split = grid.model_parallel
    query = model.num_heads * model.head_dim // split
    key_value = model.n_kv_heads * model.head_dim // split
    probabilities = 0
    if not fused:
        probabilities = model.num_heads * model.seq_length // split
    # before and after rotation; the heads' output; both norms' input and output; wo's output
    return 3 * query + 3 * key_value + probabilities + 5 * _hidden(model, grid)


def _expert_values(model: MixtralConfig, grid: ParallelConfig) -> int:
    """Values a layer's router and experts keep for the backward pass, for one token."""
    moe, split = model.moe_config, grid.model_parallel
    slots = moe.num_experts_chosen * (1.0 if moe.dropless else moe.capacity_factor)
    if moe.dropless:  # room for all tokens of all ranks that share the experts: any may get them
        slots *= exchange_ranks(grid)
    # dispatched tokens, w1's and w3's output, their product, w2's output; each of the
    # tensor-parallel ranks that share out the experts sees its part of the tokens
    _, _, width = expert_matrix(grid)
    local_slots = slots * width / split
    experts = local_slots * (2 * model.hidden_size + 3 * model.intermediate_size // width)
    return int(experts + 2 * moe.expert_num)


def attention_again(config: RunConfig, grid: ParallelConfig, stage: int) -> float:
    """Share of a stage's layers of which attention and norms alone are computed again."""
    section, layers = (
        config.recompute_config,
        layers_per_stage(config.model.model_config, grid.pipeline_stage),
    )
    if section.recompute or keeps_layer_inputs(grid, stage):
        return 0.0
    return selected_layers(section.select_recompute, layers)[stage] / layers[stage]


def _cache_bytes(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    """KV cache of the whole sequence, float32 logits of one position."""
    model = config.model.model_config
    width = dtype_bytes(model.compute_dtype, config.context.device_target)
    layers = layers_per_stage(model, grid.pipeline_stage)[stage]
    key_value = 2 * model.n_kv_heads * model.head_dim // grid.model_parallel
    sequences = config.predict_batch_size or model.batch_size
    positions = sequences * model.seq_length
    return layers * key_value * positions * width + 4 * sequences * model.vocab_size


def tokens_per_micro_batch(config: RunConfig) -> int:
    """T, the tokens of a micro batch on one rank."""
    sequences = config.runner_config.batch_size or 1
    grid = effective_parallel(config)
    return sequences * config.model.model_config.seq_length // grid.context_parallel
