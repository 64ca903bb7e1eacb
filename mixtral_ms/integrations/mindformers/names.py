"""The names under which MindFormers and its YAMLs find Mixtral.

MindFormers' Mixtral YAMLs say `type: LlamaConfig` and `type: LlamaForCausalLM`; more than one
expert makes them Mixtral. What has one expert stays MindFormers' own.
"""

from typing import Any

import mindformers
from mindformers.core.optim.adamw import AdamW
from mindformers.models import PreTrainedModel
from mindformers.modules.transformer.moe import MoEConfig
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mixtral_ms.integrations.mindformers import trainers
from mixtral_ms.integrations.mindformers.config import MindFormersMixtralConfig
from mixtral_ms.integrations.mindformers.network import MindFormersMixtral


class LlamaConfig(mindformers.LlamaConfig):
    """Makes a `MindFormersMixtralConfig` where there are several experts, else MindFormers' own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> mindformers.LlamaConfig:  # noqa: D102
        several = _expert_num(kwargs.get("moe_config")) > 1
        return (MindFormersMixtralConfig if several else mindformers.LlamaConfig)(*args, **kwargs)


class LlamaForCausalLM(mindformers.LlamaForCausalLM):
    """Makes a `MindFormersMixtral` where there are several experts, else MindFormers' own."""

    def __new__(cls, config: mindformers.LlamaConfig) -> PreTrainedModel:  # noqa: D102
        several = _expert_num(config.moe_config) > 1
        return (MindFormersMixtral if several else mindformers.LlamaForCausalLM)(config)


class FP32StateAdamWeightDecay(AdamW):
    """AdamW under the name of older YAMLs, which MindFormers no longer has."""

    def __init__(
        self, params: list, beta1: float = 0.9, beta2: float = 0.999, **others: Any
    ) -> None:
        super().__init__(params, betas=(beta1, beta2), **others)


def register_all() -> None:
    """Register configuration, network, trainers and the optimizer's older name."""
    register, kind = MindFormerRegister.register_cls, MindFormerModuleType
    for config in (MindFormersMixtralConfig, LlamaConfig):
        register(config, kind.CONFIG)
    for network in (MindFormersMixtral, LlamaForCausalLM):
        register(network, kind.MODELS)
    for trainer in (trainers.CausalLanguageModelingTrainer, trainers.GeneralTaskTrainer):
        register(trainer, kind.TRAINER)
    register(trainers.GeneralTaskTrainer, kind.TRAINER, alias="general")
    if not MindFormerRegister.is_exist(kind.OPTIMIZER, FP32StateAdamWeightDecay.__name__):
        register(FP32StateAdamWeightDecay, kind.OPTIMIZER)


def _expert_num(moe_config: dict | MoEConfig | None) -> int:
    if isinstance(moe_config, dict):
        return moe_config.get("expert_num", 1)
    return getattr(moe_config, "expert_num", 1)
