"""For MindFormers' `--register_path`, which is to name this file's folder.

A YAML with this line needs no other import:

    trainer:
      auto_register: register.CausalLanguageModelingTrainer
"""

from mixtral_ms.integrations.mindformers import MindFormersMixtral, MindFormersMixtralConfig
from mixtral_ms.integrations.mindformers.trainers import CausalLanguageModelingTrainer

__all__ = ["CausalLanguageModelingTrainer", "MindFormersMixtralConfig", "MindFormersMixtral"]
