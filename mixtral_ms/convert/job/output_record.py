"""What a conversion writes down beside its output."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.store.conversion_record import (
    FILES_KEY,
    FORMAT_KEY,
    OTHERS_KEY,
    SOURCE_KEY,
)
from mixtral_ms.config.checks.saved_network import NETWORK_KEY
from mixtral_ms.convert.formats.foreign_config import FoundConfig
from mixtral_ms.convert.job.conversion_plan import ConversionPlan
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY


def description(
    plan: ConversionPlan, found: FoundConfig | None, chat_template: Any = None
) -> dict[str, Any]:
    """What was converted, the network's configuration where it is known, and its chat template."""
    network: dict[str, Any] = {}
    if found is not None:
        network = {NETWORK_KEY: dataclasses.asdict(found.config)}
        if found.others:
            network[OTHERS_KEY] = dict(found.others)
    merged = {} if plan.merged is None else {"merged_lora": str(plan.merged.path)}
    return {
        FORMAT_KEY: plan.target_format.name,
        SOURCE_KEY: str(plan.source.path),
        "source_format": plan.source_format.name,
        **merged,
        **({} if chat_template is None else {CHAT_TEMPLATE_KEY: chat_template}),
        **network,
    }


def file_hashes(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Every file and tensor with its size and hash."""
    return {FILES_KEY: {name: dataclasses.asdict(entry) for name, entry in files.items()}}
