"""The record that a conversion leaves with its output: what it holds, every tensor's hash."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.manifest import STATE
from mixtral_ms.checkpoint.tensor_stream import FileEntry
from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.convert.model_config import RECORD_SUFFIX, read_json
from mixtral_ms.convert.names import FORMATS
from mixtral_ms.convert.plan import Plan

FOLDER_RECORD = "conversion.json"
_FORMAT = "weights_format"


def description(plan: Plan, config: MixtralConfig | None) -> dict[str, Any]:
    """What was converted, and the network's configuration where it is known."""
    found = {} if config is None else {"model_config": dataclasses.asdict(config)}
    merged = {} if plan.merged is None else {"merged_lora": str(plan.merged.path)}
    return {
        _FORMAT: plan.target_format.name,
        "converted_from": str(plan.source.path),
        "source_format": plan.source_format.name,
        **merged,
        **found,
    }


def file_hashes(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Every file and tensor with its size and hash."""
    return {"files": {name: dataclasses.asdict(entry) for name, entry in files.items()}}


def recorded_format(source: Path) -> str | None:
    """The format that a record with the weights says they are in."""
    places = [source / STATE, source / FOLDER_RECORD]
    if not source.is_dir():
        places = [source.with_name(source.name + RECORD_SUFFIX), source.parent.parent / STATE]
    for place in places:
        if place.is_file():
            name = read_json(place).get(_FORMAT)
            return name if name in FORMATS else None
    return None
