"""Sections that say how work is spread: `parallel`, `parallel_config`, `recompute_config`."""

from dataclasses import dataclass, field
from typing import Literal

from mixtral_ms.config.sections.fields import inert

_EXPLICIT = "tensors are split as parallel_config says, without a search"
_ASCEND_GRAPH = "it tunes Ascend's own parallel compiler"

_COMMUNICATION = "collectives run again where what they are part of is computed again"

ParallelMode = Literal[
    0,
    1,
    2,
    3,
    "stand_alone",
    "data_parallel",
    "semi_auto_parallel",
    "auto_parallel",
    "hybrid_parallel",
]

StageKeeps = Literal["layer_inputs", "stage_input"]


@dataclass
class ParallelOptimizerConfig:
    """`parallel.parallel_optimizer_config`."""

    gradient_accumulation_shard: bool = False
    """Keep of gradients' sums only the part whose moments the rank has (ZeRO-2): each micro batch
    reduces its own, in its graph, while the backward pass goes on. Less memory, and as many times
    the bytes sent as there are micro batches. Needs enable_parallel_optimizer."""
    parallel_optimizer_threshold: int = inert(64, "optimizer state is split whatever its size")
    optimizer_weight_shard_size: int = inert(-1, "optimizer state is split over data_parallel")


@dataclass
class StrategyCheckpointConfig:
    """`parallel.strategy_ckpt_config`."""

    save_file: str = inert("./ckpt_strategy.ckpt", "strategy files lie beside the checkpoint")
    load_file: str = inert("", "a checkpoint carries its own strategy files")
    only_trainable_params: bool = inert(True, "all parameters are in the strategy file")


@dataclass
class ParallelContext:
    """`parallel`: how MindSpore's parallel context is set."""

    parallel_mode: ParallelMode = inert(0, _EXPLICIT)
    gradients_mean: bool = inert(False, "gradients are always the mean over the global batch")
    enable_alltoall: bool = inert(False, "experts exchange tokens as expert_parallel needs")
    full_batch: bool = inert(True, "each rank reads its own records")
    dataset_strategy: str | list = inert("full_batch", "each rank reads its own records")
    search_mode: str = inert("sharding_propagation", _EXPLICIT)
    enable_parallel_optimizer: bool = False
    """Split optimizer state over the data-parallel ranks (ZeRO-1)."""
    parallel_optimizer_config: ParallelOptimizerConfig = field(
        default_factory=ParallelOptimizerConfig
    )
    gradient_bucket_mb: int | None = None
    """Reduce small gradients that go to the same ranks in messages of at most so many MB; 0 sends
    each by itself. Two buckets are in memory beside the gradients. Empty: 64 on Ascend, 0 on a
    CPU."""
    strategy_ckpt_save_file: str = inert(
        "./ckpt_strategy.ckpt", "strategy files lie beside the checkpoint"
    )
    strategy_ckpt_load_file: str = inert("", "a checkpoint carries its own strategy files")
    strategy_ckpt_config: StrategyCheckpointConfig | None = None
    pipeline_stages: int = inert(1, "parallel_config.pipeline_stage says it")
    pipeline_config: dict | None = inert(None, "the pipeline schedule is plain 1F1B")
    device_num: int | None = inert(None, "the launcher says how many processes there are")
    loss_repeated_mean: bool = inert(True, "the loss is the mean over the global batch")
    comm_fusion: dict | None = inert(None, "gradient_bucket_mb says it")
    auto_parallel_search_mode: str = inert("recursive_programming", _EXPLICIT)
    full_batch_is_set: bool = inert(False, _ASCEND_GRAPH)
    memory_offload_config: dict | None = inert(None, _ASCEND_GRAPH)
    gradient_fp32_sync: bool = inert(True, "gradients are summed in float32")


@dataclass
class HcclBuffers:
    """`parallel_config.hccl_buffer_size`: MB of each of the two buffers that HCCL has for a group.

    Empty keeps HCCL's own size: HCCL_BUFFSIZE of the environment, else 200. Messages that are
    larger go in pieces. The group of all ranks always has HCCL's own.
    """

    tensor: int | None = None
    """Ranks that split heads, widths and vocabulary."""
    context: int | None = None
    """Ranks that split the sequence."""
    tokens: int | None = None
    """Ranks with other tokens for the same weights."""
    stage_ranks: int | None = None
    """Ranks of a pipeline stage."""
    exchange: int | None = None
    """Ranks that exchange tokens for experts."""
    expert_copies: int | None = None
    """Ranks with the same experts."""
    expert_ranks: int | None = None
    """Ranks that have all experts together."""
    pair: int | None = None
    """Neighbours in the pipeline."""


GRID_SIZES = {
    "dp": "data_parallel",
    "mp": "model_parallel",
    "ep": "expert_parallel",
    "pp": "pipeline_stage",
    "cp": "context_parallel",
}
"""Short name of each size of the rank grid -> its key."""


@dataclass
class ParallelConfig:
    """`parallel_config`: sizes of the rank grid."""

    data_parallel: int = 1
    """Groups of ranks that see different sequences of the batch."""
    model_parallel: int = 1
    """Ranks over which attention heads, expert widths and the vocabulary are split."""
    expert_parallel: int = 1
    """Ranks over which the experts are split: data-parallel ones, then model-parallel ones."""
    pipeline_stage: int = 1
    """Stages over which the layers are split."""
    context_parallel: int = 1
    """Ranks over which the sequence is split."""
    micro_batch_num: int = 1
    """Micro batches of one step in the pipeline; at least pipeline_stage."""
    stage_keeps: StageKeeps = "layer_inputs"
    """What pipeline stages before the last keep of a micro batch under way: "layer_inputs", of
    which each layer is computed again just before its backward, whatever recompute says; or
    "stage_input", of which the whole stage is, and with recompute each layer once more."""
    use_seq_parallel: bool = False
    """Split the norms' activations along the sequence over the model-parallel ranks."""
    vocab_emb_dp: bool = True
    """Keep the embedding whole on each rank; False splits it over model_parallel."""
    hccl_buffer_size: HcclBuffers | None = None
    optimizer_shard: bool | None = inert(None, "parallel.enable_parallel_optimizer says it")
    gradient_aggregation_group: int = inert(4, "parallel.gradient_bucket_mb says it")
    context_parallel_algo: str = inert("colossalai_cp", "one algorithm is implemented")
    ulysses_degree_in_cp: int = inert(1, "one algorithm is implemented")
    virtual_pipeline: int = inert(1, "the pipeline schedule is plain 1F1B")
    seq_split_num: int = inert(1, "the pipeline schedule is plain 1F1B")
    mem_coeff: float = inert(0.1, _ASCEND_GRAPH)


@dataclass
class RecomputeConfig:
    """`recompute_config`: what is computed again in the backward pass to save memory."""

    recompute: bool = False
    """Recompute every decoder layer: half the activations' memory and more, a third more time."""
    select_recompute: bool | list | dict = False
    """Recompute attention and norms alone, in layers that `recompute` does not: experts, which take
    most of the time, are not computed again. A list has a number of layers for each stage."""
    select_comm_recompute: bool | list | dict = inert(False, _COMMUNICATION)
    select_recompute_exclude: bool | list | dict = inert(
        False, "select_recompute names no operator"
    )
    select_comm_recompute_exclude: bool | list | dict = inert(False, _COMMUNICATION)
    parallel_optimizer_comm_recompute: bool = inert(False, "optimizer state is not regathered")
    mp_comm_recompute: bool = inert(True, "collectives inside a recomputed layer run again")
    recompute_slice_activation: bool = inert(False, "recompute keeps only the layer's input")
