"""Configuration: typed sections of a run's YAML, loading, checks, rendering."""

from mixtral_ms.config.load import load_config
from mixtral_ms.config.model import MixtralConfig, MoEConfig
from mixtral_ms.config.overrides import Override
from mixtral_ms.config.schema import RunConfig

__all__ = ["MixtralConfig", "MoEConfig", "Override", "RunConfig", "load_config"]
