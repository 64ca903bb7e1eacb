"""How much memory a rank needs, by counting: an estimate made before anything is built.

Parameters, gradients and both moments are float32; activations have compute_dtype.

Legend: T tokens of a micro batch, D hidden, H heads, K kv heads, d head_dim, F intermediate,
E experts, V vocabulary, S sequence.
"""

import math
from dataclasses import dataclass

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.config.parallel_sections import ParallelConfig
from mixtral_ms.config.resolve import effective_parallel
from mixtral_ms.config.schema import RunConfig
from mixtral_ms.config.stages import layers_per_stage
from mixtral_ms.parallel.layout import local_parameter_shapes, rule_of

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    ranks: int
    """How many ranks look like this one."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass; in prediction the cache."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def dtype_bytes(dtype: str, device_target: str) -> int:
    """Bytes of one value; a CPU computes bfloat16 as float32."""
    return 4 if device_target == "CPU" and dtype == "bfloat16" else _BYTES[dtype]


def memory_plan(config: RunConfig) -> list[RankMemory]:
    """What each pipeline stage's ranks hold, one entry a stage."""
    grid = effective_parallel(config)
    return [_stage_memory(config, grid, stage) for stage in range(grid.pipeline_stage)]


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


def _stage_memory(config: RunConfig, grid: ParallelConfig, stage: int) -> RankMemory:
    model = config.model.model_config
    shapes = local_parameter_shapes(model, grid, stage)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    count = sum(sizes.values())
    training = config.run_mode in ("train", "finetune")
    return RankMemory(
        stage=stage,
        ranks=grid.data_parallel * grid.model_parallel * grid.context_parallel,
        parameters=4 * count,
        gradients=4 * count if training else 0,
        optimizer=_optimizer_bytes(config, grid, sizes) if training else 0,
        activations=(
            _activation_bytes(config, grid, stage)
            if training
            else _cache_bytes(config, grid, stage)
        ),
    )


def _optimizer_bytes(config: RunConfig, grid: ParallelConfig, sizes: dict[str, int]) -> int:
    """Two float32 moments a value."""
    bytes_per_value = 8
    if not (config.use_parallel and config.parallel.enable_parallel_optimizer):
        return bytes_per_value * sum(sizes.values())
    total = 0
    for name, size in sizes.items():
        # an expert's replicas are the data-parallel ranks that hold the same experts
        expert = rule_of(name).expert_axis is not None
        replicas = grid.data_parallel // (grid.expert_parallel if expert else 1)
        total += bytes_per_value * math.ceil(size / max(replicas, 1))
    return total


def _activation_bytes(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    model = config.model.model_config
    width = dtype_bytes(model.compute_dtype, config.context.device_target)
    tokens = _tokens(config, grid)
    layers = layers_per_stage(model, grid.pipeline_stage)[stage]
    fused = config.context.device_target == "Ascend"
    per_layer = tokens * _layer_values_per_token(model, grid, fused=fused) * width
    kept = per_layer * layers
    if config.recompute_config.recompute:  # a layer's input stays, one layer at a time is redone
        kept = tokens * _hidden(model, grid) * width * layers
    # 1F1B: the first stage has as many micro batches under way as there are stages
    kept *= min(grid.pipeline_stage - stage, max(grid.micro_batch_num, 1))
    if config.recompute_config.recompute:
        kept += per_layer
    if stage == grid.pipeline_stage - 1:  # float32 logits and their gradient
        kept += 2 * 4 * tokens * model.vocab_size // grid.model_parallel
    return kept


def _hidden(model: MixtralConfig, grid: ParallelConfig) -> int:
    """Width of the residual stream on one rank, were it cut there."""
    return model.hidden_size // (grid.model_parallel if grid.use_seq_parallel else 1)


def _layer_values_per_token(model: MixtralConfig, grid: ParallelConfig, *, fused: bool) -> int:
    """Values a decoder layer keeps for its backward pass, for one token.

    Fused attention (Ascend) does not keep the S x S probabilities.
    """
    moe, split = model.moe_config, grid.model_parallel
    query = model.num_heads * model.head_dim // split
    key_value = model.n_kv_heads * model.head_dim // split
    probabilities = 0
    if not fused:
        probabilities = model.num_heads * model.seq_length // split
    # before and after rotation; the heads' output; both norms' input and output; wo's output
    attention = 3 * query + 3 * key_value + probabilities + 5 * _hidden(model, grid)
    slots = moe.num_experts_chosen * (1.0 if moe.dropless else moe.capacity_factor)
    # dispatched rows, w1's and w3's output, their product, w2's output
    experts = slots * (2 * model.hidden_size + 3 * model.intermediate_size // split)
    return int(attention + experts + 2 * moe.expert_num)


def _cache_bytes(config: RunConfig, grid: ParallelConfig, stage: int) -> int:
    """Keys and values of the whole sequence, float32 logits of one position."""
    model = config.model.model_config
    width = dtype_bytes(model.compute_dtype, config.context.device_target)
    layers = layers_per_stage(model, grid.pipeline_stage)[stage]
    key_value = 2 * model.n_kv_heads * model.head_dim // grid.model_parallel
    rows = config.predict_batch_size or model.batch_size
    return layers * key_value * rows * model.seq_length * width + 4 * rows * model.vocab_size


def _tokens(config: RunConfig, grid: ParallelConfig) -> int:
    """Tokens of a micro batch on one rank."""
    rows = config.runner_config.batch_size or 1
    return rows * config.model.model_config.seq_length // grid.context_parallel
