"""Mixtral inside MindFormers: importing this module registers it, under the YAMLs' names too.

    from mixtral_ms.integrations.mindformers import MindFormersMixtralConfig, MindFormersMixtral

docs/mindformers.md says what works where. Needs the extra `mixtral-ms[mindformers]`.
"""

from importlib.util import find_spec

from mixtral_ms.errors import MissingDependencyError

if find_spec("mindformers") is None:
    raise MissingDependencyError(
        "mindformers", "mindformers", "mixtral_ms.integrations.mindformers"
    )

import mindspore  # noqa: F401 - first: protobuf that others load before it ends the interpreter

from mixtral_ms.integrations.mindformers.config import MindFormersMixtralConfig
from mixtral_ms.integrations.mindformers.names import register_all
from mixtral_ms.integrations.mindformers.network import MindFormersMixtral

register_all()

__all__ = ["MindFormersMixtralConfig", "MindFormersMixtral"]
