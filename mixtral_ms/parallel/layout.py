"""The one table that says how each parameter is split over ranks.

Legend: D hidden, H heads, K kv heads, d head_dim, F intermediate, E experts, V vocabulary.
A parameter lives on the ranks of its pipeline stage; there it may be cut along one axis over the
tensor-parallel ranks and along another over the expert-parallel ranks. The network's local shapes,
strategy files, resharding, weight conversion and the memory plan all read this table.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.config.parallel_sections import ParallelConfig
from mixtral_ms.config.stages import layers_per_stage
from mixtral_ms.errors import UserError

EMBEDDING = "model.tok_embeddings.embedding_weight"
FINAL_NORM = "model.norm_out.weight"
LM_HEAD = "lm_head.weight"
LAYER = "model.layers.{layer}."

Place = Literal["first_stage", "layer", "last_stage"]


@dataclass(frozen=True)
class ParameterRule:
    """How the parameters whose name matches `pattern` are laid out."""

    pattern: str
    place: Place
    tensor_axis: int | None = None
    """Axis cut over parallel_config.model_parallel; None keeps the axis whole."""
    expert_axis: int | None = None
    """Axis cut over parallel_config.expert_parallel."""


_LAYER = r"model\.layers\.\d+\."
_EXPERTS = _LAYER + r"feed_forward\.routed_experts\.ffn\."

RULES: tuple[ParameterRule, ...] = (
    ParameterRule(r"model\.tok_embeddings\.embedding_weight", "first_stage", tensor_axis=0),
    ParameterRule(_LAYER + r"(attention_norm|ffn_norm)\.weight", "layer"),
    ParameterRule(_LAYER + r"attention\.w[qkv]\.(weight|bias)", "layer", tensor_axis=0),
    ParameterRule(_LAYER + r"attention\.wo\.weight", "layer", tensor_axis=1),
    ParameterRule(_LAYER + r"attention\.wo\.bias", "layer"),
    ParameterRule(_LAYER + r"feed_forward\.routed_experts\.router\.dense\.weight", "layer"),
    ParameterRule(_EXPERTS + r"w[13]\.weight", "layer", tensor_axis=1, expert_axis=0),
    ParameterRule(_EXPERTS + r"w2\.weight", "layer", tensor_axis=2, expert_axis=0),
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
    rule, local = rule_of(name), list(shape)
    whole_embedding = name == EMBEDDING and grid.vocab_emb_dp
    cuts = [
        (rule.tensor_axis, grid.model_parallel, "model_parallel"),
        (rule.expert_axis, grid.expert_parallel, "expert_parallel"),
    ]
    for axis, ranks, key in cuts:
        if axis is None or whole_embedding:
            continue
        if local[axis] % ranks:
            raise UserError(
                f"{name}: axis {axis} of length {local[axis]} is not divisible by "
                f"parallel_config.{key} {ranks}"
            )
        local[axis] //= ranks
    return tuple(local)


def local_parameter_shapes(
    config: MixtralConfig, grid: ParallelConfig, stage: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters (or their parts) on a rank of pipeline stage `stage`."""
    return {
        name: local_shape(name, shape, grid)
        for name, shape in parameter_shapes(config).items()
        if stage in stages_of(name, config, grid.pipeline_stage)
    }
