"""The network's configuration: the fields of MindFormers' `LlamaConfig` and `MoEConfig`.

Section 2 of the Mixtral paper (arXiv 2401.04088) gives the sizes of 8x7B.
"""

from dataclasses import dataclass, field
from typing import Literal

from mixtral_ms.config.sections.fields import (
    Dtype,
    derived,
    fill_derived,
    gives_way,
    inert,
    one_of,
    unsupported,
)
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.errors import UserError

_MULTI_DEVICE = "it tunes collectives on Ascend only"
_OTHER_MODEL = "Mixtral has no such part"

NO_TOKEN = -1
"""An id that stands for: there is no such token."""
ROUTING_POLICIES = ["TopkRouterV2"]
"""Values of `routing_policy`; model/moe/router_policy.py has their rules, and adds more of them."""


@dataclass
class MoEConfig:
    """`moe_config`: router and experts."""

    expert_num: int = 8
    num_experts_chosen: int = 2
    capacity_factor: float = -1.0
    """Slots per expert relative to an even load; 0 or less means dropless (nothing is dropped)."""
    enable_sdrop: bool = False
    """Hand out slots token by token (True) or all first choices before all second ones (False)."""
    routing_policy: str = one_of(ROUTING_POLICIES, "TopkRouterV2")
    """The rule that chooses experts."""
    aux_loss_factor: float = 0.0
    """Weight of the load-balancing loss; 0.01-0.05 are usual, 0 switches it off."""
    z_loss_factor: float = 0.0
    """Weight of mean(logsumexp(router logits)^2); 1e-3 is usual."""
    router_dense_type: Dtype = inert("float32", "the router is computed in float32")
    router_jitter: float = 0.0
    """Multiply the router's input by uniform(1-j, 1+j) in training; 0 switches it off."""
    uniform_routing: bool = False
    """Debug switch: send tokens to the experts in turn, whatever the router says."""
    norm_topk_prob: bool = True
    expert_group_size: int | None = unsupported(None, "capacity is counted per data-parallel group")
    group_wise_a2a: bool = inert(False, _MULTI_DEVICE)
    comp_comm_parallel: bool = False
    """Exchange tokens between ranks in parts, so that the all-to-all of one part may run beside the
    experts' products of another. With expert_parallel and a capacity, on Ascend."""
    comp_comm_parallel_degree: int = 2
    """In how many parts; more of them overlap better and compute worse."""
    save_token_distribution: bool = inert(False, "expert load is always in metrics.jsonl")
    cur_layer: int = inert(0, "it is set by the network")
    enable_cold_hot_expert: bool = unsupported(False, _OTHER_MODEL)
    update_step: int = inert(10000, _OTHER_MODEL)
    hot_expert_num: int = inert(0, _OTHER_MODEL)
    cold_token_percent: float = inert(1.0, _OTHER_MODEL)
    moe_module_name: str = inert("", _OTHER_MODEL)
    use_fused_ops_topkrouter: bool = inert(False, "the backend chooses its kernels")
    use_fused_ops_permute: bool = inert(False, "the backend chooses its kernels")
    use_gmm: bool = inert(False, "dropless experts always use the grouped matmul")
    enable_gmm_safe_tokens: bool = inert(False, "empty experts are always safe")
    shared_expert_num: int = unsupported(0, _OTHER_MODEL)
    use_shared_expert_gating: bool = unsupported(False, _OTHER_MODEL)
    max_router_load: int = inert(128 * 1024, _OTHER_MODEL)
    topk_method: str = unsupported("greedy", _OTHER_MODEL)
    topk_group: int | None = unsupported(None, _OTHER_MODEL)
    n_group: int | None = unsupported(None, _OTHER_MODEL)
    first_k_dense_replace: int = unsupported(0, _OTHER_MODEL)
    moe_intermediate_size: int | None = unsupported(None, "use intermediate_size")
    routed_scaling_factor: float = unsupported(1.0, _OTHER_MODEL)
    aux_loss_types: list | None = unsupported(None, "aux_loss_factor weighs the one auxiliary loss")
    aux_loss_factors: list | None = unsupported(
        None, "aux_loss_factor weighs the one auxiliary loss"
    )
    balance_via_topk_bias: bool = unsupported(False, _OTHER_MODEL)
    topk_bias_update_rate: float = inert(0.0, _OTHER_MODEL)
    use_allgather_dispatcher: bool = inert(False, _MULTI_DEVICE)
    expert_model_parallel: int | None = inert(None, "experts are split as parallel_config says")
    use_gating_sigmoid: bool = unsupported(False, _OTHER_MODEL)
    enable_deredundency: bool = inert(False, _MULTI_DEVICE)
    npu_nums_per_device: int = inert(8, _MULTI_DEVICE)
    callback_moe_droprate: bool = inert(False, "the drop rate is always in metrics.jsonl")

    @property
    def dropless(self) -> bool:
        """Whether every assignment is kept."""
        return self.capacity_factor <= 0

    @property
    def exchange_parts(self) -> int:
        """In how many parts experts of a capacity exchange and compute their tokens."""
        in_parts = self.comp_comm_parallel and not self.dropless
        return self.comp_comm_parallel_degree if in_parts else 1


def _head_dim(model: "MixtralConfig") -> int:
    if model.num_heads < 1 or model.hidden_size % model.num_heads:
        raise UserError(
            f"model_config.hidden_size {model.hidden_size} is not divisible by "
            f"model_config.num_heads {model.num_heads}: change one of them or give head_dim"
        )
    return model.hidden_size // model.num_heads


def _llama_intermediate_size(model: "MixtralConfig") -> int:
    """LLaMA's rule: 8/3 of the hidden size, scaled, rounded up to a multiple."""
    size = int(2 * 4 * model.hidden_size / 3)
    if model.ffn_dim_multiplier is not None:
        size = int((model.ffn_dim_multiplier + 0.01) * size)
    if model.multiple_of < 1:
        raise UserError(f"model_config.multiple_of must be 1 or more, not {model.multiple_of}")
    return model.multiple_of * ((size + model.multiple_of - 1) // model.multiple_of)


@dataclass
class MixtralConfig:
    """`model.model_config`: the network (MindFormers' `LlamaConfig`, `type: LlamaConfig`)."""

    type: Literal["LlamaConfig", "MixtralConfig"] = "MixtralConfig"
    # sizes
    batch_size: int = gives_way("runner_config.batch_size", 1)
    seq_length: int = 2048
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    n_kv_heads: int = derived(lambda model: model.num_heads)
    """Key/value heads of grouped-query attention; empty means as many as num_heads."""
    head_dim: int = derived(_head_dim)
    """Width of a head; empty means hidden_size / num_heads."""
    vocab_size: int = 32000
    intermediate_size: int = derived(_llama_intermediate_size)
    """Width of an expert; empty means the LLaMA rule from the two keys below."""
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    max_position_embedding: int = derived(lambda model: model.seq_length)
    """Longest position; empty means seq_length."""
    # numerics
    rms_norm_eps: float = 1e-5
    theta: float = 10000.0
    """Base of the rotary embedding; Mixtral uses 1e6."""
    compute_dtype: Dtype = "float16"
    param_init_type: Dtype = inert("float32", "parameters are kept in float32")
    layernorm_compute_type: Dtype = "float32"
    """In which Ascend computes norms, their weights rounded to it; a CPU does in float32."""
    softmax_compute_type: Dtype = "float32"
    rotary_dtype: Dtype = "float32"
    residual_dtype: Dtype | None = None
    embedding_init_type: Dtype | None = inert(None, "parameters are kept in float32")
    init_method_std: float = 0.02
    # tokens
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2
    """Ends an answer; of several each does, and the first is the one that is written. -1, as with
    the other two: there is none."""
    pad_token_id: int = 0
    ignore_token_id: int = -100
    # structure
    sliding_window: int | None = None
    """Each position sees itself and this many - 1 before it; empty means all before it."""
    qkv_has_bias: bool = False
    attn_proj_has_bias: bool = False
    tie_word_embeddings: bool = False
    moe_config: MoEConfig = field(default_factory=MoEConfig)
    pet_config: PetSection | None = None
    """Train low-rank adapters instead of the weights."""
    # generation
    use_past: bool = False
    block_size: int = 16
    num_blocks: int = 512
    top_k: int = 5
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    max_decode_length: int = 1024
    max_new_tokens: int | None = None
    do_sample: bool = True
    # execution
    use_flash_attention: bool = inert(False, "the backend chooses its kernels")
    use_fused_rope: bool = True
    """Rotary embedding by one operator, on Ascend; other backends choose their own kernels."""
    use_fused_swiglu: bool = True
    """SwiGLU of the experts by one operator, on Ascend; other backends choose their own kernels."""
    offset: int | list[int] = 0
    """Uneven pipeline stages: layers added to (or taken from) each stage."""
    pp_interleave_num: int = inert(1, "the pipeline schedule is plain 1F1B")
    pipeline_stage: dict | None = inert(None, "parallel_config.pipeline_stage says it")
    checkpoint_name_or_path: str | None = None
    qkv_concat: bool = inert(False, "checkpoints keep wq, wk and wv apart")
    rl_config: dict | None = unsupported(None, _OTHER_MODEL)
    quant_config: dict | None = unsupported(None, "weights are not quantised")
    extend_method: str = unsupported("None", "Mixtral scales no positions")
    scaling_factor: float | dict = unsupported(1.0, "Mixtral scales no positions")
    is_dynamic: bool = inert(False, "the engine chooses its shapes")
    use_rope_slice: bool = inert(False, "rotary tables are computed once")
    use_ring_attention: bool = inert(False, "parallel_config.context_parallel chooses it")
    use_attn_mask_compression: bool = inert(False, "the backend chooses its kernels")
    fused_rms_norm: bool = inert(True, "the backend chooses its kernels")
    rmsnorm_compute_2d: bool = inert(False, "the backend chooses its kernels")
    parallel_optimizer: bool = inert(False, "parallel.enable_parallel_optimizer chooses it")
    fine_grain_interleave: int = inert(1, _MULTI_DEVICE)
    input_sliced_sig: bool = inert(False, "records hold seq_length + 1 ids and are sliced here")
    chunk_prefill: bool = inert(False, "the engine always fills in chunks")
    calculate_per_token_loss: bool = inert(True, "the loss is always per token")
    return_hidden_states: bool = inert(False, _OTHER_MODEL)
    mlp_has_gate: bool = unsupported(True, "experts are always SwiGLU")
    llm_backend: str = inert("", "the backend is chosen by device_target")
    pretrain_seqlen: int | None = inert(None, "seq_length says it")
    compute_in_2d: bool = inert(True, "tensors have the shapes the kernels like best")
    use_past_shard: bool = inert(False, "the cache is split as the heads are")
    max_length: int | None = inert(None, "max_decode_length says it")
    hidden_act: Literal["silu"] = "silu"
    parallel_decoding_params: dict | None = inert(None, _OTHER_MODEL)

    def __post_init__(self) -> None:
        if isinstance(self.moe_config, dict):
            self.moe_config = MoEConfig(**self.moe_config)
        if isinstance(self.pet_config, dict):
            self.pet_config = PetSection(**self.pet_config)
        fill_derived(self)

    @property
    def eos_id(self) -> int | None:
        """The id that is written where a text ends; None where there is none."""
        return next(iter(self.eos_token_ids), None)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer; the first is the one that is written."""
        given = self.eos_token_id
        return [one for one in (given if isinstance(given, list) else [given]) if one != NO_TOKEN]
