"""Mixtral for MindSpore: train, evaluate and sample a sparse mixture of experts from YAML.

Names are imported when they are first used: reading a configuration needs no MindSpore.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MixtralConfig": "mixtral_ms.config",
    "MoEConfig": "mixtral_ms.config",
    "RunConfig": "mixtral_ms.config",
    "load_config": "mixtral_ms.config",
    "MixtralForCausalLM": "mixtral_ms.model.mixtral",
    "Trainer": "mixtral_ms.train.trainer",
    "pipeline": "mixtral_ms.infer.text_generation_pipeline",
}
__all__ = [  # noqa: F822 - resolved by __getattr__
    "MixtralConfig",
    "MixtralForCausalLM",
    "MoEConfig",
    "RunConfig",
    "Trainer",
    "load_config",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixtral_ms' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
