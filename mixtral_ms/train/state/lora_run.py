"""What a LoRA run has besides any run: the weights that it is for, and PEFT's files."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from mixtral_ms.checkpoint.store.conversion_record import SOURCE_KEY
from mixtral_ms.config import MixtralConfig, RunConfig
from mixtral_ms.config.derived.parameter_table import adapted_rows
from mixtral_ms.convert.adapters.lora_weights import (
    base_record,
    fingerprint,
    fingerprint_of,
    open_adapter,
    require_continued,
)
from mixtral_ms.convert.adapters.peft_export import write_peft
from mixtral_ms.convert.formats.foreign_config import CONFIG_JSON
from mixtral_ms.convert.run_weights import find_run_weights, open_run_weights
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes, parameter_shapes

PEFT_FOLDER = "peft"


def base_of(
    config: RunConfig, network: MixtralForCausalLM, *, resumed: bool
) -> dict[str, str] | None:
    """The record of the weights beneath the adapters; None where there are no adapters.

    Args:
        config: the run.
        network: with its weights.
        resumed: whether a checkpoint of the run says what is beneath its adapters. Else it is
            checked that `adapter` can be trained on: by its scale, on its own weights.

    Raises:
        UserError: it cannot.
    """
    if (pet := network.config.pet_config) is None:
        return None
    if network.mesh.world_size > 1:
        # no rank may hold all of them; in the file they are what they were loaded from
        weights = fingerprint_of(open_run_weights(dataclasses.replace(config, adapter="")))
    else:
        tensors = ((p.name, p.shape, p.asnumpy().__getitem__) for p in network.weights())
        weights = fingerprint(tensors)
    base = base_record(config.load_checkpoint or "", weights)
    if config.adapter and not resumed:
        adapter = open_adapter(Path(config.adapter), network.config)
        require_continued(adapter, pet, weights, base["path"])
    return base


def save_peft(config: RunConfig, checkpoints: Path) -> Path:
    """Write the newest checkpoint's adapters in PEFT's format; returns the folder.

    Raises ValueError for a run that is not one of LoRA.
    """
    folder, network = Path(config.output_dir) / PEFT_FOLDER, config.model.model_config
    if network.pet_config is None:
        raise ValueError("model_config.pet_config is empty: this run has no adapters")
    tensors = open_adapter(checkpoints, network).tensors
    arrays = {name: tensors.read(name) for name in adapter_shapes(network)}
    write_peft(folder, arrays, network.pet_config, _base_for_peft(config))
    return folder


def _base_for_peft(config: RunConfig) -> str | None:
    """The folder for transformers that holds the weights beneath the adapters, if there is one.

    They may have been converted from it. A checkpoint of ours is none: PEFT would try to open it.
    """
    try:
        found = find_run_weights(config)
        record = read_json_object(found.record) if found.record else {}
    except UserError:
        return None
    for folder in (found.path, record.get(SOURCE_KEY)):
        if isinstance(folder, str | Path) and (Path(folder) / CONFIG_JSON).is_file():
            return str(folder)
    get_logger().info(
        "%s: base_model_name_or_path is left empty, as no folder for transformers is known that "
        "holds the weights: give PeftModel.from_pretrained the model that they are",
        PEFT_FOLDER,
    )
    return None


def trained_text(config: MixtralConfig) -> str:
    """How many parameters are trained on all ranks, and of LoRA what is adapted."""
    pet, weights = config.pet_config, _count(parameter_shapes(config))
    if pet is None:
        return f"{weights:,} parameters"
    modules = [row.module for _, row in adapted_rows(pet, config.num_layers)]
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    text = ", ".join(kinds).replace("dense", "router")
    adapters = _count(adapter_shapes(config))
    return f"{weights:,} frozen parameters, {adapters:,} of LoRA (rank {pet.lora_rank}, {text})"


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
