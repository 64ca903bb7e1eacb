"""The one table of how weights are named and laid out in every format, as literal data.

Legend: D hidden, F width of an expert, E experts, V vocabulary. Our orientation of a matrix is
(outputs, inputs): w1 and w3 (F, D), w2 (D, F), as Hugging Face has it.
"""

from dataclasses import dataclass
from typing import Literal

from mixtral_ms.parallel.grid.sharding_rules import EMBEDDING, FINAL_NORM, LAYER, LM_HEAD

Op = Literal["same", "transposed", "interleaved"]
"""How a matrix is stored, relative to ours: `interleaved` has the rows of each head in the order
of rotary pairs (0, d/2, 1, d/2+1, ...) where ours has halves (0, 1, ..., d-1)."""


@dataclass(frozen=True)
class Entry:
    """One of our parameters, or several that share a tensor, and the tensor that holds them."""

    ours: tuple[str, ...]
    """Names with {layer}; several alternate within each expert, along the rows."""
    theirs: str
    """Name with {layer} and, where every expert has a tensor of its own, {expert}."""
    op: Op = "same"
    rows: bool = False
    """Experts follow one another along axis 0 of a matrix, instead of on an axis of their own."""
    optional: bool = False
    """Held only where the network has it: biases, and the head when it is not the embedding."""


@dataclass(frozen=True)
class Format:
    """A way to name and lay out the weights."""

    name: str
    text: str
    """What it is, for messages."""
    entries: tuple[Entry, ...]
    mindspore: bool
    """Read by MindSpore, not by PyTorch."""


ROUTER = LAYER + "feed_forward.routed_experts.router.dense.weight"
_EXPERTS = LAYER + "feed_forward.routed_experts.ffn."
_EXPERT_GATE, EXPERT_DOWN, _EXPERT_UP = (_EXPERTS + f"{w}.weight" for w in ("w1", "w2", "w3"))
QUERY, KEY, _VALUE, _OUTPUT = (LAYER + f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo"))
_ATTENTION_NORM, _FFN_NORM = LAYER + "attention_norm.weight", LAYER + "ffn_norm.weight"
_BIASES = tuple(LAYER + f"attention.{w}.bias" for w in ("wq", "wk", "wv", "wo"))


def _entries(
    theirs: dict[str, str], optional: tuple[str, ...] = (), op: Op = "same"
) -> tuple[Entry, ...]:
    return tuple(Entry((a,), b, op, optional=a in optional) for a, b in theirs.items())


def _same_names(names: tuple[str, ...], optional: bool = False) -> tuple[Entry, ...]:
    return tuple(Entry((name,), name, optional=optional) for name in names)


_MINDSPORE_OUTSIDE = (
    *_same_names((EMBEDDING, _ATTENTION_NORM, QUERY, KEY, _VALUE, _OUTPUT)),
    *_same_names(_BIASES, optional=True),
    *_same_names((_FFN_NORM, FINAL_NORM)),
    *_same_names((LM_HEAD,), optional=True),
)
_ROUTED = {name: name for name in (ROUTER, _EXPERT_GATE, EXPERT_DOWN, _EXPERT_UP)}
_ROUTED_OLD = {a: a.replace("routed_experts.", "") for a in _ROUTED}

_HF_OUTSIDE = _entries(
    {
        EMBEDDING: "model.embed_tokens.weight",
        _ATTENTION_NORM: "model.layers.{layer}.input_layernorm.weight",
        QUERY: "model.layers.{layer}.self_attn.q_proj.weight",
        KEY: "model.layers.{layer}.self_attn.k_proj.weight",
        _VALUE: "model.layers.{layer}.self_attn.v_proj.weight",
        _OUTPUT: "model.layers.{layer}.self_attn.o_proj.weight",
        _FFN_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
        FINAL_NORM: "model.norm.weight",
        LM_HEAD: "lm_head.weight",
    },
    optional=(LM_HEAD,),
)
_HF_MOE = "model.layers.{layer}.block_sparse_moe."

_NATIVE_OUTSIDE = (
    *_entries(
        {
            EMBEDDING: "tok_embeddings.weight",
            _ATTENTION_NORM: "layers.{layer}.attention_norm.weight",
            _VALUE: "layers.{layer}.attention.wv.weight",
            _OUTPUT: "layers.{layer}.attention.wo.weight",
            _FFN_NORM: "layers.{layer}.ffn_norm.weight",
            FINAL_NORM: "norm.weight",
            LM_HEAD: "output.weight",
        },
        optional=(LM_HEAD,),
    ),
    Entry((QUERY,), "layers.{layer}.attention.wq.weight", "interleaved"),
    Entry((KEY,), "layers.{layer}.attention.wk.weight", "interleaved"),
)
_NATIVE_MOE = "layers.{layer}.block_sparse_moe."

OURS = Format(
    "ours",
    "MindSpore, stacked experts: w1 and w3 (E, F, D), w2 (E, D, F)",
    (*_MINDSPORE_OUTSIDE, *_entries(_ROUTED)),
    mindspore=True,
)
MINDFORMERS_OLD = Format(
    "mindformers_old",
    "MindSpore, stacked experts, names of MindFormers before routed_experts",
    (*_MINDSPORE_OUTSIDE, *_entries(_ROUTED_OLD)),
    mindspore=True,
)
GMM = Format(
    "gmm",
    "MindSpore, experts for the grouped matmul: w1 and w3 (E, D, F), w2 (E, F, D)",
    (
        *_MINDSPORE_OUTSIDE,
        Entry((ROUTER,), ROUTER),
        *_entries(
            {a: _ROUTED[a] for a in (_EXPERT_GATE, EXPERT_DOWN, _EXPERT_UP)}, op="transposed"
        ),
    ),
    mindspore=True,
)
GMM_OLD = Format(
    "gmm_old",
    "MindSpore, experts for the grouped matmul, names of MindFormers before routed_experts",
    (
        *_MINDSPORE_OUTSIDE,
        Entry((ROUTER,), _ROUTED_OLD[ROUTER]),
        *_entries(
            {a: _ROUTED_OLD[a] for a in (_EXPERT_GATE, EXPERT_DOWN, _EXPERT_UP)}, op="transposed"
        ),
    ),
    mindspore=True,
)
HF = Format(
    "hf",
    "Hugging Face, a tensor for every expert",
    (
        *_HF_OUTSIDE,
        Entry((ROUTER,), _HF_MOE + "gate.weight"),
        Entry((_EXPERT_GATE,), _HF_MOE + "experts.{expert}.w1.weight"),
        Entry((EXPERT_DOWN,), _HF_MOE + "experts.{expert}.w2.weight"),
        Entry((_EXPERT_UP,), _HF_MOE + "experts.{expert}.w3.weight"),
    ),
    mindspore=False,
)
HF_FUSED = Format(
    "hf_fused",
    "the parameters of transformers 5 as they are in memory: gate_up_proj (E, 2F, D)",
    (
        *_HF_OUTSIDE,
        Entry((ROUTER,), "model.layers.{layer}.mlp.gate.weight"),
        Entry((_EXPERT_GATE, _EXPERT_UP), "model.layers.{layer}.mlp.experts.gate_up_proj"),
        Entry((EXPERT_DOWN,), "model.layers.{layer}.mlp.experts.down_proj"),
    ),
    mindspore=False,
)
NATIVE = Format(
    "native",
    "Mistral's own release, a tensor for every expert",
    (
        *_NATIVE_OUTSIDE,
        Entry((ROUTER,), "layers.{layer}.feed_forward.gate.weight"),
        Entry((_EXPERT_GATE,), "layers.{layer}.feed_forward.experts.{expert}.w1.weight"),
        Entry((EXPERT_DOWN,), "layers.{layer}.feed_forward.experts.{expert}.w2.weight"),
        Entry((_EXPERT_UP,), "layers.{layer}.feed_forward.experts.{expert}.w3.weight"),
    ),
    mindspore=False,
)
NATIVE_STACKED = Format(
    "native_stacked",
    "Mistral's first release: w1, w2 and w3 (E*F, D)",
    (
        *_NATIVE_OUTSIDE,
        Entry((ROUTER,), _NATIVE_MOE + "gate.weight"),
        Entry((_EXPERT_GATE,), _NATIVE_MOE + "w1", rows=True),
        Entry((EXPERT_DOWN,), _NATIVE_MOE + "w2", "transposed", rows=True),
        Entry((_EXPERT_UP,), _NATIVE_MOE + "w3", rows=True),
    ),
    mindspore=False,
)

FORMATS = {
    one.name: one
    for one in (OURS, MINDFORMERS_OLD, GMM, GMM_OLD, HF, HF_FUSED, NATIVE, NATIVE_STACKED)
}
WRITABLE = ("ours", "gmm", "mindformers_old", "gmm_old", "hf")
"""What a conversion can make; the others are only read."""

NOT_WEIGHTS = (
    r"(adam_[mv]|moment[12]|moments|accu_grads)\..+",
    r"global_step|epoch_num|step_num|current_step|global_batch_size|loss_scale|scale_sense|learning_rate",
    r"beta[12]_power|current_iterator_step|last_overflow_iterator_step",
    r"(.+\.)?rotary_emb\.inv_freq",
)
"""Tensors that checkpoints hold beside the weights; they are left out and counted."""
