"""How much memory a rank of a run that answers needs, by counting its tensors as they are stored.

Legend: T tokens of a piece of a prompt, S keys, D hidden, H heads, K kv heads, d head_dim, F
intermediate, k experts a token, V vocabulary, N sequences.
"""

import math
from dataclasses import dataclass

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.derived.parameter_table import (
    EMBEDDING,
    layer_of,
    parameters_of,
    row_of,
)
from mixtral_ms.config.derived.prediction import (
    PREFILL_CHUNK,
    PredictionDtypes,
    prediction_batch,
    prediction_dtypes,
    prediction_grid,
    stored_dtype,
)
from mixtral_ms.config.loading.resolve import effective_parallel, rank_count
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.parallel.grid.sharding_rules import placement_on_stage
from mixtral_ms.parallel.planner.memory_model import DTYPE_BYTES, format_bytes

_SCALE_BYTES = 4  # of a row of int8
_COLUMNS = ("weights", "cache", "casts", "work", "total")


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of a rank's weights, by how often a step of one token a sequence reads them."""

    embedding: int
    """Of which a token reads one row."""
    experts: int
    """Of which a token reads the chosen ones."""
    others: int
    """Which every step reads whole."""
    cast_in_layer: int
    """Of a layer, as it is computed with: those that are stored in another format."""
    cast: int
    """The same of all layers and the head."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.embedding + self.experts + self.others


@dataclass(frozen=True)
class PredictMemory:
    """Bytes on each rank of a run that answers."""

    ranks: int
    """They all look like this one."""
    weights: int
    """As stored, scales of int8 included."""
    cache: int
    """All blocks of the KV cache, which are allocated at once."""
    casts: int
    """One layer's weights as they are computed with, where they are stored in another format."""
    work: int
    """What a piece of a prompt needs at its peak, and the logits."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.casts + self.work


def predict_memory(config: RunConfig) -> PredictMemory:
    """What each rank of the run holds while it answers."""
    weights = stored_weights(config)
    return PredictMemory(
        ranks=rank_count(config),
        weights=weights.total,
        cache=positions_of_cache(config) * position_bytes(config),
        casts=weights.cast_in_layer,
        work=_work_bytes(config, run_dtypes(config), effective_parallel(config)),
    )


def run_dtypes(config: RunConfig) -> PredictionDtypes:
    """Number formats that the run's device computes with."""
    on_device = config.context.device_target == "Ascend"
    return prediction_dtypes(config.model.model_config, config.weight_dtype, on_device=on_device)


def stored_weights(config: RunConfig) -> StoredWeights:
    """The weights of one rank, each tensor as it is stored.

    Raises:
        UserError: a tensor does not divide over the ranks.
    """
    model, grid = config.model.model_config, prediction_grid(effective_parallel(config))
    # C++, which one process on a CPU has, reads every format where it lies
    casts = config.context.device_target == "Ascend" or rank_count(config) > 1
    products = run_dtypes(config).products
    sizes = dict.fromkeys(("embedding", "experts", "others"), 0)
    cast = cast_in_layer = 0
    for name, row in parameters_of(model):
        shape = row.shape(model)
        local = placement_on_stage(name, len(shape), grid).local_shape(shape)
        stored = stored_dtype(name, config.weight_dtype)
        size = DTYPE_BYTES[stored] * math.prod(local)
        if stored == "int8":
            size += _SCALE_BYTES * math.prod(local[:-1])
        sizes[_kind(name, tied=model.tie_word_embeddings)] += size
        if casts and not row.always_float32 and stored != products:
            as_computed = DTYPE_BYTES[products] * math.prod(local)
            cast += as_computed
            cast_in_layer += as_computed if layer_of(name) == 0 else 0
    return StoredWeights(**sizes, cast_in_layer=cast_in_layer, cast=cast)


def format_predict_memory(memory: PredictMemory) -> str:
    """The plan as a small table."""
    sizes = "".join(f"{format_bytes(getattr(memory, name)):>12}" for name in _COLUMNS)
    titles = "".join(f"{name:>12}" for name in _COLUMNS)
    return f"ranks{titles}\n{memory.ranks:>5}{sizes}"


def positions_of_cache(config: RunConfig) -> int:
    """How many positions all blocks hold."""
    model = config.model.model_config
    return model.num_blocks * model.block_size


def position_bytes(config: RunConfig) -> int:
    """Of keys and values of one position in all layers, on one rank."""
    model, grid = config.model.model_config, effective_parallel(config)
    width = DTYPE_BYTES[run_dtypes(config).cache]
    return 2 * model.num_layers * model.n_kv_heads // grid.model_parallel * model.head_dim * width


def _kind(name: str, *, tied: bool) -> str:
    row = row_of(name)
    if row is EMBEDDING and not tied:
        return "embedding"
    return "others" if row.expert_axis is None else "experts"


def _work_bytes(config: RunConfig, dtypes: PredictionDtypes, grid: ParallelConfig) -> int:
    """The residual stream and one layer's tensors of a piece of a prompt, and the logits."""
    model, split = config.model.model_config, grid.model_parallel
    width, cache_width = DTYPE_BYTES[dtypes.products], DTYPE_BYTES[dtypes.cache]
    tokens = min(PREFILL_CHUNK, model.seq_length)
    heads = (model.num_heads + 2 * model.n_kv_heads) * model.head_dim // split
    keys = 2 * model.seq_length * model.n_kv_heads * model.head_dim // split
    attention = tokens * 2 * heads * width + keys * cache_width
    if config.context.device_target != "Ascend":  # scores, their sum with the mask, probabilities
        attention += 3 * 4 * tokens * model.num_heads // split * model.seq_length
    _, _, expert_split = expert_matrix(grid)
    rows = tokens * model.moe_config.num_experts_chosen
    experts = rows * (2 * model.hidden_size + 3 * model.intermediate_size // expert_split) * width
    residual = 3 * tokens * model.hidden_size * width
    logits = 2 * 4 * prediction_batch(config) * model.vocab_size
    return residual + max(attention, experts) + logits
