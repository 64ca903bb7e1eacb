"""MindFormers' configuration of the network, and ours made from it."""

import dataclasses
from typing import Any

from mindformers import LlamaConfig
from mindformers.modules.transformer.moe import MoEConfig as UpstreamMoEConfig
from mindspore import dtype as mstype

from mixtral_ms.config.sections.fields import INERT, UNSUPPORTED
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.errors import UserError

_DTYPE_NAMES = {
    mstype.float32: "float32",
    mstype.float16: "float16",
    mstype.bfloat16: "bfloat16",
}
_NOT_COPIED = {"type", "moe_config", "pet_config"}


class MindFormersMixtralConfig(LlamaConfig):
    """All fields of MindFormers' `LlamaConfig`; `moe_config` as a dict or a MoEConfig."""

    model_type = "mixtral"


# MindFormers registers a class, and writes it into files, by the class's own name.
MindFormersMixtralConfig.__name__ = "MixtralConfig"


def network_config(config: LlamaConfig) -> MixtralConfig:
    """Our configuration of the network that MindFormers' describes.

    Read when the network is built: MindFormers' Trainer still sets fields after the configuration
    was made.

    Raises:
        UserError: a field asks for something that Mixtral has not.
    """
    _require_mixtral(config)
    moe = _values(config.moe_config, MoEConfig, UpstreamMoEConfig(), "moe_config")
    return MixtralConfig(
        type="MixtralConfig",
        moe_config=MoEConfig(**moe),
        **_values(config, MixtralConfig, LlamaConfig(), "model_config"),
    )


def _require_mixtral(config: LlamaConfig) -> None:
    moe = config.moe_config
    if moe.expert_num == 1:
        raise UserError(
            "moe_config.expert_num 1: Mixtral has several experts; for a dense network take "
            "MindFormers' LlamaForCausalLM"
        )
    if moe.routing_policy != "TopkRouterV2":
        raise UserError(
            f"moe_config.routing_policy {moe.routing_policy!r}: Mixtral's is TopkRouterV2"
        )
    if getattr(config, "pet_config", None):
        raise UserError(
            "model_config.pet_config: MindFormers' adapters do not fit this network; train LoRA "
            "with mixtral-ms run, whose merged weights load here"
        )
    for name in ("model_parallel", "expert_parallel", "pipeline_stage", "context_parallel"):
        if (ranks := getattr(config.parallel_config, name)) > 1:
            raise UserError(
                f"parallel_config.{name} {ranks}: inside MindFormers each process has the whole "
                "network; mixtral-ms run splits it"
            )


def _values(source: Any, ours: type, usual: Any, section: str) -> dict[str, Any]:
    """The values of `source` for those fields of our section that mean something here.

    A field that Mixtral has not may be as MindFormers' `usual` configuration has it.
    """
    values = {}
    for field in dataclasses.fields(ours):
        if field.name in _NOT_COPIED or not hasattr(source, field.name):
            continue
        value = getattr(source, field.name)
        if UNSUPPORTED in field.metadata:
            if value not in (field.default, getattr(usual, field.name)):
                why = field.metadata[UNSUPPORTED]
                raise UserError(f"{section}.{field.name} {value!r} is not supported: {why}")
        elif INERT not in field.metadata:
            values[field.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """MindSpore's dtypes by name."""
    return _DTYPE_NAMES.get(value, value) if isinstance(value, mstype.Type) else value
