"""LoRA adapters out of PEFT's format: those of attention, under our names.

Those of router and experts are only written (peft_export.py): transformers 5 has parameters there,
with one adapter for w1 and w3 together, where ours has one for each.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorSource
from mixtral_ms.config.derived.parameter_row import LORA_A, LORA_B
from mixtral_ms.config.derived.parameter_table import adaptable_rows
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.convert.adapters.peft_export import (
    CONFIG_FILE,
    PEFT_PREFIX,
    PREFIX,
    transformers_names,
)
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import JsonShape, read_json_object, require_shape

# Keys by which PEFT computes something else than W + scale * B A, with what leaves it at that.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
}
_SHAPE: JsonShape = {
    "r": int,
    "lora_alpha": float,
    "use_rslora?": (bool, None),
    "lora_dropout?": float,
}
_LETTERS = {"lora_A": LORA_A, "lora_B": LORA_B}


def open_peft(folder: Path, num_layers: int, flag: str) -> tuple[PetSection, TensorSource]:
    """An adapter that PEFT saved: its rank, scale and modules, and A and B under our names.

    Args:
        folder: with adapter_config.json.
        num_layers: of the network.
        flag: with which it was given.

    Raises:
        UserError: it is of another kind than LoRA of attention; the key or tensor is
            named.
    """
    file = folder / CONFIG_FILE
    data = read_json_object(file)
    require_shape(data, _SHAPE, str(file))
    for key, plain in _PLAIN.items():
        if key in data and data[key] not in plain:
            raise UserError(f"{flag}: {file}: {key} is {data[key]!r}; only {plain[0]!r} is read")
    source = open_tensors(_tensor_file(folder, flag))
    names = _our_names(source, num_layers, flag)
    rank, alpha = data["r"], float(data["lora_alpha"])
    if data.get("use_rslora"):
        alpha *= math.sqrt(rank)
    modules = sorted({name.rpartition(".lora_")[0] for name in names})
    pet = PetSection(
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=data.get("lora_dropout", 0.0),
        target_modules="|".join(map(re.escape, modules)),
    )
    return pet, _RenamedTensors(folder, source, names)


def _tensor_file(folder: Path, flag: str) -> Path:
    for suffix in (".safetensors", ".bin"):
        if (path := folder / f"{PEFT_PREFIX}{suffix}").is_file():
            return path
    raise UserError(f"{flag}: {folder} lacks {PEFT_PREFIX}.safetensors, which belongs to it")


def _our_names(source: TensorSource, num_layers: int, flag: str) -> dict[str, str]:
    """Our name of every A and B -> PEFT's."""
    ours = {
        transformers_names(row, layer)[0]: row.module.format(layer=layer)
        for row, lora in adaptable_rows()
        if lora.peft == "module"
        for layer in range(num_layers)
    }
    names = {}
    for name in source.infos:
        module, _, letter = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if module not in ours or letter not in _LETTERS:
            raise UserError(
                f"{flag}: {source.path} adapts {name}: of PEFT's adapters those of attention are "
                f"read, in {num_layers} layers"
            )
        names[ours[module] + _LETTERS[letter]] = name
    return names


class _RenamedTensors(TensorSource):
    """Tensors of a file under other names."""

    def __init__(self, path: Path, source: TensorSource, names: Mapping[str, str]) -> None:
        self.path, self._source, self._names = path, source, names
        self.infos = {ours: source.infos[theirs] for ours, theirs in names.items()}

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource."""
        return self._source.read(self._names[name], region)


def described_base(folder: Path) -> Any:
    """What PEFT's file says of the weights that the adapter is for."""
    return read_json_object(folder / CONFIG_FILE).get("base_model_name_or_path")
