"""The one table that says how each parameter is split over ranks.

Legend: D hidden, H heads, K kv heads, d head_dim, F intermediate, E experts, V vocabulary.
A parameter lives on the ranks of its pipeline stage; there it may be cut along one axis over the
tensor-parallel ranks and along another over the expert-parallel ranks (`config/expert_ranks.py`
says which those are). The network's local shapes, strategy files, resharding, weight conversion and
the memory plan all read this table.

Rank order is MindFormers': rank = (stage * data_parallel + data index) * model_parallel + tensor
index; context-parallel ranks lie between those two.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Placement

EMBEDDING = "model.tok_embeddings.embedding_weight"
FINAL_NORM = "model.norm_out.weight"
LM_HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."
LORA_A, LORA_B = ".lora_a", ".lora_b"
"""What stands behind a module's name in the names of its adapter."""
MOMENTS = ("adam_m.", "adam_v.")
"""What stands before a parameter's name in the names of its optimizer moments."""

Place = Literal["first_stage", "layer", "last_stage"]


@dataclass(frozen=True)
class ParameterRule:
    """How the parameters whose name matches `pattern` are laid out."""

    pattern: str
    place: Place
    tensor_axis: int | None = None
    """Axis cut over parallel_config.model_parallel (of experts: what expert_parallel leaves of it);
    None keeps every axis whole."""
    expert_axis: int | None = None
    """Axis cut over parallel_config.expert_parallel."""


_LAYER = r"model\.layers\.\d+\."
_EXPERTS = _LAYER + r"feed_forward\.routed_experts\.ffn\."

# Of y = x A^T B^T, A (r, in) or (E, r, in) is cut as the weight's inputs are, and B (out, r) or
# (E, out, r) as its outputs.
_ADAPTER_RULES = (
    ParameterRule(_LAYER + r"attention\.w[qkv]\.lora_a", "layer"),
    ParameterRule(_LAYER + r"attention\.w[qkv]\.lora_b", "layer", tensor_axis=0),
    ParameterRule(_LAYER + r"attention\.wo\.lora_a", "layer", tensor_axis=1),
    ParameterRule(_LAYER + r"attention\.wo\.lora_b", "layer"),
    ParameterRule(_LAYER + r"feed_forward\.routed_experts\.router\.dense\.lora_[ab]", "layer"),
    ParameterRule(_EXPERTS + r"w[13]\.lora_a", "layer", expert_axis=0),
    ParameterRule(_EXPERTS + r"w[13]\.lora_b", "layer", tensor_axis=1, expert_axis=0),
    ParameterRule(_EXPERTS + r"w2\.lora_a", "layer", tensor_axis=2, expert_axis=0),
    ParameterRule(_EXPERTS + r"w2\.lora_b", "layer", expert_axis=0),
)

RULES: tuple[ParameterRule, ...] = (
    ParameterRule(r"model\.tok_embeddings\.embedding_weight", "first_stage", tensor_axis=0),
    ParameterRule(_LAYER + r"(attention_norm|ffn_norm)\.weight", "layer"),
    ParameterRule(_LAYER + r"attention\.w[qkv]\.(weight|bias)", "layer", tensor_axis=0),
    ParameterRule(_LAYER + r"attention\.wo\.weight", "layer", tensor_axis=1),
    ParameterRule(_LAYER + r"attention\.wo\.bias", "layer"),
    ParameterRule(_LAYER + r"feed_forward\.routed_experts\.router\.dense\.weight", "layer"),
    ParameterRule(_EXPERTS + r"w[13]\.weight", "layer", tensor_axis=1, expert_axis=0),
    ParameterRule(_EXPERTS + r"w2\.weight", "layer", tensor_axis=2, expert_axis=0),
    *_ADAPTER_RULES,
    ParameterRule(r"model\.norm_out\.weight", "last_stage"),
    ParameterRule(r"lm_head\.weight", "last_stage", tensor_axis=0),
)


def rule_of(name: str) -> ParameterRule:
    """The rule of a parameter.

    Raises:
        UserError: no rule matches, so nobody knows how to split it.
    """
    for rule in RULES:
        if re.fullmatch(rule.pattern, name):
            return rule
    raise UserError(f"{name!r} is not a parameter of this network")


def parameter_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter, in the network's order."""
    vocabulary, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, hidden)}
    for layer in range(config.num_layers):
        prefix = LAYER.format(layer=layer)
        shapes.update({prefix + name: shape for name, shape in _layer_shapes(config).items()})
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (vocabulary, hidden)
    return shapes


def _layer_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.n_kv_heads * config.head_dim
    experts = config.moe_config.expert_num
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (hidden,),
        "attention.wq.weight": (query, hidden),
        "attention.wk.weight": (key_value, hidden),
        "attention.wv.weight": (key_value, hidden),
    }
    if config.qkv_has_bias:
        shapes["attention.wq.bias"] = (query,)
        shapes["attention.wk.bias"] = (key_value,)
        shapes["attention.wv.bias"] = (key_value,)
    shapes["attention.wo.weight"] = (hidden, query)
    if config.attn_proj_has_bias:
        shapes["attention.wo.bias"] = (hidden,)
    routed = "feed_forward.routed_experts."
    shapes["ffn_norm.weight"] = (hidden,)
    shapes[routed + "router.dense.weight"] = (experts, hidden)
    shapes[routed + "ffn.w1.weight"] = (experts, width, hidden)
    shapes[routed + "ffn.w2.weight"] = (experts, hidden, width)
    shapes[routed + "ffn.w3.weight"] = (experts, width, hidden)
    return shapes


def adapter_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every LoRA parameter that pet_config asks for, in the network's order."""
    if config.pet_config is None:
        return {}
    weights, shapes = parameter_shapes(config), {}
    for module in config.pet_config.modules(config.num_layers):
        *experts, outputs, inputs = weights[f"{module}.weight"]
        shapes[module + LORA_A] = (*experts, config.pet_config.lora_rank, inputs)
        shapes[module + LORA_B] = (*experts, outputs, config.pet_config.lora_rank)
    return shapes


def parameter_count(config: MixtralConfig) -> int:
    """Number of trainable values: 46,702,792,704 for Mixtral 8x7B."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def active_parameter_count(config: MixtralConfig) -> int:
    """Values that one token meets: all but the experts that were not chosen for it."""
    moe = config.moe_config
    chosen = min(moe.num_experts_chosen, moe.expert_num)
    count = 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        if rule_of(name).expert_axis is not None:
            size = size * chosen // moe.expert_num
        count += size
    return count


def stages_of(name: str, config: MixtralConfig, stages: int) -> tuple[int, ...]:
    """The pipeline stages that hold a parameter; two for an embedding that is also the head."""
    place = rule_of(name).place
    if place == "first_stage":
        tied = config.tie_word_embeddings and stages > 1
        return (0, stages - 1) if tied else (0,)
    if place == "last_stage":
        return (stages - 1,)
    layer, end = int(name.split(".")[2]), 0
    for stage, count in enumerate(layers_per_stage(config, stages)):
        end += count
        if layer < end:
            return (stage,)
    raise UserError(f"{name!r}: there are only {config.num_layers} layers")


def local_shape(name: str, shape: tuple[int, ...], grid: ParallelConfig) -> tuple[int, ...]:
    """Shape of a parameter's part on one rank.

    Raises:
        UserError: an axis does not divide by the number of ranks it is cut over.
    """
    return _local_shape(name, shape, placement_on_stage(name, len(shape), grid), grid)


def local_parameter_shapes(
    config: MixtralConfig, grid: ParallelConfig, stage: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters (or their parts) on a rank of pipeline stage `stage`."""
    return {
        name: local_shape(name, shape, grid)
        for name, shape in parameter_shapes(config).items()
        if stage in stages_of(name, config, grid.pipeline_stage)
    }


def placements(
    config: MixtralConfig, grid: ParallelConfig, names: Iterable[str], *, zero: bool
) -> dict[str, dict[int, Placement]]:
    """Where parameters and optimizer moments are: name -> pipeline stage -> placement.

    Args:
        names: of parameters, or of their moments: with one of MOMENTS in front.
        zero: cut the moments, not the parameters (ZeRO-1), over all replicas along axis 0. A moment
            that does not divide so stays whole.

    Raises:
        UserError: no rule matches a name, or an axis does not divide.
    """
    shapes, result = parameter_shapes(config) | adapter_shapes(config), {}
    stages, ranks = grid.pipeline_stage, math.prod(expert_matrix(grid))
    for name in names:
        parameter = parameter_of(name)
        if parameter not in shapes:
            raise UserError(f"{name!r} is not a parameter of this network, nor a moment of one")
        shape = shapes[parameter]
        placement = placement_on_stage(parameter, len(shape), grid)
        local = _local_shape(parameter, shape, placement, grid)
        if zero and parameter != name:
            placement = _sharded(placement, local)
        result[name] = {
            stage: replace(placement, first_rank=stage * ranks)
            for stage in stages_of(parameter, config, stages)
        }
    return result


def parameter_of(name: str) -> str:
    """The parameter that a tensor belongs to: itself, or that of which it is a moment."""
    for prefix in MOMENTS:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def placement_on_stage(name: str, axes: int, grid: ParallelConfig) -> Placement:
    """How a parameter of so many axes lies on the ranks of the first stage."""
    rule = rule_of(name)
    tensor_map: list[tuple[int, ...]] = [()] * axes
    if rule.tensor_axis is not None and not (name == EMBEDDING and grid.vocab_emb_dp):
        tensor_map[rule.tensor_axis] = (0,)
    if rule.expert_axis is not None:
        tensor_map[rule.expert_axis] = (1,)
        return Placement(expert_matrix(grid), tuple(tensor_map))
    data = grid.data_parallel * grid.context_parallel
    return Placement((data, grid.model_parallel), tuple(tensor_map))


def _local_shape(
    name: str, shape: tuple[int, ...], placement: Placement, grid: ParallelConfig
) -> tuple[int, ...]:
    try:
        return placement.local_shape(shape)
    except UserError as error:
        raise UserError(
            f"{name}: {error} (parallel_config.model_parallel {grid.model_parallel}, "
            f"expert_parallel {grid.expert_parallel}, data_parallel {grid.data_parallel})"
        ) from error


def _sharded(placement: Placement, local_shape: tuple[int, ...]) -> Placement:
    """With an optimizer shard over all replicas, if the parts divide by them."""
    if placement.replicas == 1 or local_shape[0] % placement.replicas:
        return placement
    # the minor axes of the matrix do the cutting, so replicas are that many ranks apart
    step = math.prod(placement.cuts)
    return replace(placement, opt_shard_size=-1, opt_shard_step=step)
