"""The network's configuration as others read it: config.json and generation_config.json, a YAML."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixtral_ms.config.sections.model_section import NO_TOKEN, MixtralConfig
from mixtral_ms.convert.formats.foreign_config import (
    CONFIG_JSON,
    GENERATION_JSON,
    OPTIONAL_KEYS,
    REQUIRED_KEYS,
)

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
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_huggingface(
    config: MixtralConfig, others: Mapping[str, Mapping[str, Any]], dtype: str
) -> dict[str, dict[str, Any]]:
    """What transformers 4.36 to 5 read, by file.

    Args:
        config: the network.
        others: what stood there when the weights came from Hugging Face (`FoundConfig.others`).
        dtype: the weights'.
    """
    values = dataclasses.asdict(config) | dataclasses.asdict(config.moe_config)
    keys = {names[0]: values[ours] for ours, names in (REQUIRED_KEYS | OPTIONAL_KEYS).items()}
    tokens = {key: None if keys[key] == NO_TOKEN else keys[key] for key in _TOKEN_KEYS}
    kept = others.get(CONFIG_JSON, {})
    file = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **keys,
        **tokens,
        "hidden_act": config.hidden_act,
        "output_router_logits": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **kept,
    }
    own = {"_from_model_config": True, **{key: tokens[key] for key in _TOKEN_KEYS[:2]}}
    return {CONFIG_JSON: file, GENERATION_JSON: dict(others.get(GENERATION_JSON, own))}


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
