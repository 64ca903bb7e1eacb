"""The network's configuration as other systems write it: config.json, params.json; and as ours."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.store.manifest import STATE
from mixtral_ms.config import load_config
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.convert.formats.conversion_record import FORMAT_KEY
from mixtral_ms.convert.formats.detect_format import Measured
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object

CONFIG_JSON, PARAMS_JSON = "config.json", "params.json"
NETWORK_KEY = "model_config"  # in our own records
# Our key -> Hugging Face's and Mistral's; files mix them, so either is read from both.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "theta": ("rope_theta",),
    "expert_num": ("num_local_experts", "num_experts"),
    "num_experts_chosen": ("num_experts_per_tok",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "head_dim": ("head_dim",),
    "max_position_embedding": ("max_position_embeddings", "max_seq_len"),
    "sliding_window": ("sliding_window",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}
_FLOATS = {"rms_norm_eps", "theta"}
_MOE = {"expert_num", "num_experts_chosen"}
_NO_PADDING = -1
_USUAL_SEQ_LENGTH = 4096

_YAML_KEYS = (
    "seq_length",
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "n_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embedding",
    "theta",
    "rms_norm_eps",
    "sliding_window",
    "qkv_has_bias",
    "attn_proj_has_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "compute_dtype",
)


@dataclass(frozen=True)
class FoundConfig:
    """A configuration, the file it is from, and what that file calls our keys."""

    config: MixtralConfig
    path: Path
    names: Mapping[str, str]

    def name(self, ours: str) -> str:
        """The file's name of one of our keys."""
        return self.names.get(ours, ours)


def read_config(path: Path) -> FoundConfig:
    """Read a network's configuration from a YAML, config.json, params.json or one of our records.

    Raises:
        UserError: naming the file and the key that is missing, wrong or not Mixtral's.
    """
    if path.suffix in (".yaml", ".yml"):
        return FoundConfig(load_config(path).model.model_config, path, {})
    data = read_json_object(path)
    if NETWORK_KEY in data:
        return FoundConfig(_own_config(data[NETWORK_KEY], path), path, {})
    return _foreign_config(data, path)


def says_network(path: Path) -> bool:
    """Whether a JSON file is to say the network's sizes: ours may be of weights of which none knew.

    Raises:
        UserError: it cannot be read.
    """
    if path.name in (CONFIG_JSON, PARAMS_JSON):
        return True
    data = read_json_object(path)
    ours = path.name == STATE or FORMAT_KEY in data
    return not ours or NETWORK_KEY in data


def _own_config(data: dict[str, Any], path: Path) -> MixtralConfig:
    try:
        return MixtralConfig(**data)
    except TypeError as error:
        raise UserError(f"{path}: model_config is not one of this version: {error}") from None


def _foreign_config(data: dict[str, Any], path: Path) -> FoundConfig:
    if data.get("model_type", "mixtral") != "mixtral":
        raise UserError(f"{path}: model_type is {data['model_type']!r}; only mixtral is converted")
    _refuse_other_network(data, path)
    rope = data.get("rope_parameters") or {}
    flat = {**rope, **(data.get("moe") or {}), **data}
    values, names = {}, {}
    for ours, spellings in (_REQUIRED | _OPTIONAL).items():
        key = next((one for one in spellings if flat.get(one) is not None), None)
        if key is not None:
            values[ours], names[ours] = _number(flat[key], ours, key, path), key
        elif ours in _REQUIRED:
            raise UserError(_missing_text(ours, spellings, path))
    return FoundConfig(_from_values(values), path, names)


def _refuse_other_network(data: dict[str, Any], path: Path) -> None:
    rope = data.get("rope_parameters") or {}
    for key, value, allowed in (
        ("hidden_act", data.get("hidden_act"), "silu"),
        ("rope_scaling", data.get("rope_scaling"), "null"),
        ("rope_parameters.rope_type", rope.get("rope_type"), "default"),
    ):
        if value not in (None, allowed):
            raise UserError(f"{path}: {key} is {value!r}; this network only has {allowed}")


def _missing_text(ours: str, spellings: tuple[str, ...], path: Path) -> str:
    text = f"{path}: lacks the key {' or '.join(spellings)}"
    if ours == "theta":
        text += (
            ": with another base of the rotary embedding the model talks nonsense, so it is not "
            'guessed. Mixtral 8x7B and 8x22B have "rope_theta": 1000000.0'
        )
    return f"{text}. Add it to the file, or give --config a YAML or JSON that has it"


def _number(value: Any, ours: str, key: str, path: Path) -> Any:
    if ours == "tie_word_embeddings":
        kind: tuple[type, ...] = (bool,)
    else:
        kind = (int, float) if ours in _FLOATS else (int,)
    right = isinstance(value, kind) and (kind == (bool,) or not isinstance(value, bool))
    least = None if kind == (bool,) or ours.endswith("_token_id") else 0
    if not right or (least is not None and value <= least):
        expected = {bool: "true or false", int: "a whole number"}[kind[0]]
        expected = "a number above 0" if ours in _FLOATS else expected
        raise UserError(f"{path}: {key} is {value!r}; it must be {expected}")
    return float(value) if ours in _FLOATS else value


def _from_values(values: dict[str, Any]) -> MixtralConfig:
    longest = values.get("max_position_embedding")
    values.setdefault("pad_token_id", _NO_PADDING)
    moe = MoEConfig(**{key: values.pop(key) for key in _MOE})
    seq_length = min(longest or _USUAL_SEQ_LENGTH, _USUAL_SEQ_LENGTH)
    return MixtralConfig(**values, seq_length=seq_length, moe_config=moe)


def check_sizes(found: FoundConfig, sizes: Mapping[str, Measured], tied: bool) -> None:
    """Compare a configuration with the tensors.

    Args:
        found: the configuration.
        sizes: what `measure` found.
        tied: whether the tensors lack a head of their own.

    Raises:
        UserError: they contradict; it names the key, the tensor and both numbers.
    """
    config = found.config
    heads, head_dim = found.name("num_heads"), found.name("head_dim")
    for size, key, value in (
        ("vocab_size", found.name("vocab_size"), config.vocab_size),
        ("hidden_size", found.name("hidden_size"), config.hidden_size),
        ("query_width", f"{heads} * {head_dim}", config.num_heads * config.head_dim),
        (
            "key_value_width",
            f"{found.name('n_kv_heads')} * {head_dim}",
            config.n_kv_heads * config.head_dim,
        ),
        ("intermediate_size", found.name("intermediate_size"), config.intermediate_size),
        ("expert_num", found.name("expert_num"), config.moe_config.expert_num),
        ("num_layers", found.name("num_layers"), config.num_layers),
    ):
        shown = sizes[size]
        if shown.value != value:
            raise UserError(
                f"{found.path}: {key} is {value}, but by the tensor {shown.tensor} of shape "
                f"{shown.shape} it is {shown.value}: the file is of other weights, or tensors are "
                "missing"
            )
    if config.tie_word_embeddings != tied:
        raise UserError(
            f"{found.path}: tie_word_embeddings is {config.tie_word_embeddings}, but the tensors "
            f"{'lack' if tied else 'hold'} a head of their own"
        )


def to_huggingface(config: MixtralConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers 4.36 to 5; `dtype` is the weights'."""
    values = dataclasses.asdict(config) | dataclasses.asdict(config.moe_config)
    keys = {names[0]: values[ours] for ours, names in (_REQUIRED | _OPTIONAL).items()}
    if keys["pad_token_id"] == _NO_PADDING:
        keys["pad_token_id"] = None
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **keys,
        "hidden_act": config.hidden_act,
        "initializer_range": config.init_method_std,
        "router_aux_loss_coef": config.moe_config.aux_loss_factor,
        "output_router_logits": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def to_yaml_section(config: MixtralConfig) -> dict[str, Any]:
    """The YAML's sections that the weights decide."""
    moe = config.moe_config
    return {
        "model": {
            "arch": {"type": "MixtralForCausalLM"},
            "model_config": {
                "type": "MixtralConfig",
                **{key: getattr(config, key) for key in _YAML_KEYS},
            },
        },
        "moe_config": {
            "expert_num": moe.expert_num,
            "num_experts_chosen": moe.num_experts_chosen,
        },
    }
