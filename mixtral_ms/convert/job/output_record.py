"""What a conversion writes down beside its output."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.formats.conversion_record import FILES_KEY, FORMAT_KEY
from mixtral_ms.convert.formats.foreign_config import NETWORK_KEY
from mixtral_ms.convert.job.conversion_plan import ConversionPlan


def description(plan: ConversionPlan, config: MixtralConfig | None) -> dict[str, Any]:
    """What was converted, and the network's configuration where it is known."""
    found = {} if config is None else {NETWORK_KEY: dataclasses.asdict(config)}
    merged = {} if plan.merged is None else {"merged_lora": str(plan.merged.path)}
    return {
        FORMAT_KEY: plan.target_format.name,
        "converted_from": str(plan.source.path),
        "source_format": plan.source_format.name,
        **merged,
        **found,
    }


def file_hashes(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Every file and tensor with its size and hash."""
    return {FILES_KEY: {name: dataclasses.asdict(entry) for name, entry in files.items()}}
