"""Configuration: typed sections of a run's YAML, loading, checks, rendering."""

from mixtral_ms.config.loading.load_config import load_config
from mixtral_ms.config.loading.overrides import Override
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.config.sections.run_section import RunConfig

__all__ = ["MixtralConfig", "MoEConfig", "Override", "RunConfig", "load_config"]
