"""The network's parameters, one row each: the only place that spells their names.

Layout over ranks, conversion, LoRA and its export, initial weights, the memory plan, inference and
the C++ decoder read these rows. A format that is added is one entry in each row.

Our orientation of a matrix is (outputs, inputs): w1 and w3 (F, D), w2 (D, F), as Hugging Face has
it. Rows stand in the order of the network and of the files that are written.

Legend: D hidden, F width of an expert.
"""

import functools
import re
from collections.abc import Iterator

from mixtral_ms.config.derived.parameter_row import (
    Axis,
    Lora,
    ParameterRow,
    Stored,
    adapter_rows,
)
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError

# Axes

VOCABULARY = Axis("vocabulary", lambda config: config.vocab_size, cut="tensor")
HIDDEN = Axis("hidden", lambda config: config.hidden_size)
QUERIES = Axis("queries", lambda config: config.num_heads * config.head_dim, cut="tensor")
KEYS = Axis("keys", lambda config: config.n_kv_heads * config.head_dim, cut="tensor")
INTERMEDIATE = Axis("intermediate", lambda config: config.intermediate_size, cut="tensor")
EXPERTS = Axis("experts", lambda config: config.moe_config.expert_num, cut="expert")
CHOICES = Axis("choices", lambda config: config.moe_config.expert_num)
"""The experts as what the router chooses from, which every rank does."""

# Prefixes

LAYER = "model.layers.{layer}."
_ATTENTION = LAYER + "attention."
_ROUTED, _ROUTED_OLD = LAYER + "feed_forward.routed_experts.", LAYER + "feed_forward."
_HF = "model.layers.{layer}."
_HF_ATTENTION, _HF_MOE, _HF_FUSED = _HF + "self_attn.", _HF + "block_sparse_moe.", _HF + "mlp."
_MISTRAL = "layers.{layer}."
_MISTRAL_MOE, _MISTRAL_STACKED = _MISTRAL + "feed_forward.", _MISTRAL + "block_sparse_moe."

# Rows

EMBEDDING = ParameterRow(
    "model.tok_embeddings.embedding_weight",
    (VOCABULARY, HIDDEN),
    stage="first_stage",
    always_float32=True,
    decoder="embedding",
    elsewhere={
        "hf": Stored("model.embed_tokens.weight"),
        "native": Stored("tok_embeddings.weight"),
    },
)
ATTENTION_NORM = ParameterRow(
    LAYER + "attention_norm.weight",
    (HIDDEN,),
    initial="ones",
    always_float32=True,
    gradient_in_parts="of sequence",
    decoder="attention_norm",
    elsewhere={
        "hf": Stored(_HF + "input_layernorm.weight"),
        "native": Stored(_MISTRAL + "attention_norm.weight"),
    },
)
QUERY = ParameterRow(
    _ATTENTION + "wq.weight",
    (QUERIES, HIDDEN),
    lora=Lora("module"),
    decoder="wq",
    elsewhere={
        "hf": Stored(_HF_ATTENTION + "q_proj.weight"),
        "native": Stored(_MISTRAL + "attention.wq.weight", "interleaved"),
    },
)
KEY = ParameterRow(
    _ATTENTION + "wk.weight",
    (KEYS, HIDDEN),
    lora=Lora("module"),
    decoder="wk",
    elsewhere={
        "hf": Stored(_HF_ATTENTION + "k_proj.weight"),
        "native": Stored(_MISTRAL + "attention.wk.weight", "interleaved"),
    },
)
VALUE = ParameterRow(
    _ATTENTION + "wv.weight",
    (KEYS, HIDDEN),
    lora=Lora("module"),
    decoder="wv",
    elsewhere={
        "hf": Stored(_HF_ATTENTION + "v_proj.weight"),
        "native": Stored(_MISTRAL + "attention.wv.weight"),
    },
)
OUTPUT = ParameterRow(
    _ATTENTION + "wo.weight",
    (HIDDEN, QUERIES),
    lora=Lora("module"),
    decoder="wo",
    elsewhere={
        "hf": Stored(_HF_ATTENTION + "o_proj.weight"),
        "native": Stored(_MISTRAL + "attention.wo.weight"),
    },
)
QUERY_BIAS = ParameterRow(
    _ATTENTION + "wq.bias",
    (QUERIES,),
    present=lambda config: config.qkv_has_bias,
    initial="zeros",
    always_float32=True,
    decoder="wq.bias",
)
KEY_BIAS = ParameterRow(
    _ATTENTION + "wk.bias",
    (KEYS,),
    present=lambda config: config.qkv_has_bias,
    initial="zeros",
    always_float32=True,
    decoder="wk.bias",
)
VALUE_BIAS = ParameterRow(
    _ATTENTION + "wv.bias",
    (KEYS,),
    present=lambda config: config.qkv_has_bias,
    initial="zeros",
    always_float32=True,
    decoder="wv.bias",
)
OUTPUT_BIAS = ParameterRow(
    _ATTENTION + "wo.bias",
    (HIDDEN,),
    present=lambda config: config.attn_proj_has_bias,
    initial="zeros",
    always_float32=True,
    gradient_in_parts="of sequence",
    decoder="wo.bias",
)
FFN_NORM = ParameterRow(
    LAYER + "ffn_norm.weight",
    (HIDDEN,),
    initial="ones",
    always_float32=True,
    gradient_in_parts="of sequence",
    decoder="ffn_norm",
    elsewhere={
        "hf": Stored(_HF + "post_attention_layernorm.weight"),
        "native": Stored(_MISTRAL + "ffn_norm.weight"),
    },
)
ROUTER = ParameterRow(
    _ROUTED + "router.dense.weight",
    (CHOICES, HIDDEN),
    always_float32=True,
    lora=Lora("parameter", word="router"),
    decoder="router",
    elsewhere={
        "mindformers_old": Stored(_ROUTED_OLD + "router.dense.weight"),
        "hf": Stored(_HF_MOE + "gate.weight"),
        "hf_fused": Stored(_HF_FUSED + "gate.weight"),
        "native": Stored(_MISTRAL_MOE + "gate.weight"),
        "native_stacked": Stored(_MISTRAL_STACKED + "gate.weight"),
    },
)
EXPERT_GATE = ParameterRow(
    _ROUTED + "ffn.w1.weight",
    (EXPERTS, INTERMEDIATE, HIDDEN),
    lora=Lora("parameter"),
    decoder="w1",
    elsewhere={
        "mindformers_old": Stored(_ROUTED_OLD + "ffn.w1.weight"),
        "gmm": Stored(_ROUTED + "ffn.w1.weight", "transposed"),
        "gmm_old": Stored(_ROUTED_OLD + "ffn.w1.weight", "transposed"),
        "hf": Stored(_HF_MOE + "experts.{expert}.w1.weight"),
        "hf_fused": Stored(_HF_FUSED + "experts.gate_up_proj"),
        "native": Stored(_MISTRAL_MOE + "experts.{expert}.w1.weight"),
        "native_stacked": Stored(_MISTRAL_STACKED + "w1", flat=True),
    },
)
EXPERT_DOWN = ParameterRow(
    _ROUTED + "ffn.w2.weight",
    (EXPERTS, HIDDEN, INTERMEDIATE),
    lora=Lora("parameter"),
    decoder="w2",
    elsewhere={
        "mindformers_old": Stored(_ROUTED_OLD + "ffn.w2.weight"),
        "gmm": Stored(_ROUTED + "ffn.w2.weight", "transposed"),
        "gmm_old": Stored(_ROUTED_OLD + "ffn.w2.weight", "transposed"),
        "hf": Stored(_HF_MOE + "experts.{expert}.w2.weight"),
        "hf_fused": Stored(_HF_FUSED + "experts.down_proj"),
        "native": Stored(_MISTRAL_MOE + "experts.{expert}.w2.weight"),
        "native_stacked": Stored(_MISTRAL_STACKED + "w2", "transposed", flat=True),
    },
)
EXPERT_UP = ParameterRow(
    _ROUTED + "ffn.w3.weight",
    (EXPERTS, INTERMEDIATE, HIDDEN),
    lora=Lora("parameter"),
    decoder="w3",
    elsewhere={
        "mindformers_old": Stored(_ROUTED_OLD + "ffn.w3.weight"),
        "gmm": Stored(_ROUTED + "ffn.w3.weight", "transposed"),
        "gmm_old": Stored(_ROUTED_OLD + "ffn.w3.weight", "transposed"),
        "hf": Stored(_HF_MOE + "experts.{expert}.w3.weight"),
        "hf_fused": Stored(_HF_FUSED + "experts.gate_up_proj"),
        "native": Stored(_MISTRAL_MOE + "experts.{expert}.w3.weight"),
        "native_stacked": Stored(_MISTRAL_STACKED + "w3", flat=True),
    },
)
FINAL_NORM = ParameterRow(
    "model.norm_out.weight",
    (HIDDEN,),
    stage="last_stage",
    initial="ones",
    always_float32=True,
    gradient_in_parts="of sequence",
    decoder="final_norm",
    elsewhere={"hf": Stored("model.norm.weight"), "native": Stored("norm.weight")},
)
LM_HEAD = ParameterRow(
    "lm_head.weight",
    (VOCABULARY, HIDDEN),
    stage="last_stage",
    present=lambda config: not config.tie_word_embeddings,
    decoder="head",
    elsewhere={"hf": Stored("lm_head.weight"), "native": Stored("output.weight")},
)

PARAMETERS: tuple[ParameterRow, ...] = (
    EMBEDDING,
    ATTENTION_NORM,
    *(QUERY, KEY, VALUE, OUTPUT),
    *(QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUTPUT_BIAS),
    FFN_NORM,
    ROUTER,
    *(EXPERT_GATE, EXPERT_DOWN, EXPERT_UP),
    FINAL_NORM,
    LM_HEAD,
)

# What readers ask

_IN_LAYER = re.compile(re.escape(LAYER).replace(r"\{layer\}", r"(\d+)"))


def parameters_of(config: MixtralConfig) -> Iterator[tuple[str, ParameterRow]]:
    """Name and row of every parameter of a network, in the network's order."""
    present = [row for row in PARAMETERS if row.present(config)]
    yield from ((row.name, row) for row in present if row.stage == "first_stage")
    for layer in range(config.num_layers):
        yield from ((row.at(layer), row) for row in present if row.stage == "layer")
    yield from ((row.name, row) for row in present if row.stage == "last_stage")


def adaptable_rows() -> list[tuple[ParameterRow, Lora]]:
    """The matrices of a layer that may have an adapter."""
    return [(row, row.lora) for row in PARAMETERS if row.lora is not None]


def adapted_rows(pet: PetSection | None, num_layers: int) -> Iterator[tuple[int, ParameterRow]]:
    """The matrices that target_modules means, each with its layer, layer after layer.

    Raises:
        re.error: it is no regular expression.
    """
    if pet is None:
        return
    pattern = re.compile(pet.target_modules)
    rows = [row for row, lora in adaptable_rows() if lora.word in pet.target_modules]
    for layer in range(num_layers):
        for row in rows:
            if pattern.fullmatch(row.module.format(layer=layer)):
                yield layer, row


def row_of(name: str) -> ParameterRow:
    """The row of a parameter, or of an adapter's A or B.

    Raises:
        UserError: there is none, so nobody knows how to split it.
    """
    row = _rows_by_name(PARAMETERS).get(_IN_LAYER.sub(LAYER, name, count=1))
    if row is None:
        raise UserError(f"{name!r} is not a parameter of this network")
    return row


def bias_of(row: ParameterRow) -> ParameterRow | None:
    """The bias that is added to a matrix's product, where a network may have one."""
    return _rows_by_name(PARAMETERS).get(f"{row.module}.bias")


@functools.lru_cache(maxsize=1)
def _rows_by_name(rows: tuple[ParameterRow, ...]) -> dict[str, ParameterRow]:
    adapters = [one for row in rows if row.lora is not None for one in adapter_rows(row)]
    return {row.name: row for row in (*rows, *adapters)}


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to; None outside layers."""
    match = _IN_LAYER.match(name)
    return int(match[1]) if match else None
