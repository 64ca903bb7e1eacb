"""LoRA adapters written in the format of the library `peft`, for Hugging Face's Mixtral.

In transformers 5 attention is modules, while router and experts are parameters, the experts' two
stacked ones: gate_up_proj (E, 2F, D), with w1 above w3, and down_proj. peft adapts parameters by
`target_parameters`, with A of all experts as (E * r, in) and B as (out, r * E). The adapters of w1
and w3 become one of rank 2r: A one above the other, B block-diagonal.

Legend: D hidden, F intermediate, E experts, r rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.safetensors_format import write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import outgoing
from mixtral_ms.config.derived.parameter_row import LORA_A, LORA_B, ParameterRow
from mixtral_ms.config.derived.parameter_table import (
    EXPERT_DOWN,
    EXPERT_GATE,
    EXPERT_UP,
    adaptable_rows,
    layer_of,
)
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside

PEFT_PREFIX = "adapter_model"
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", f"{PEFT_PREFIX}.safetensors"
PREFIX = "base_model.model."
"""Of every tensor's name."""
_TRANSFORMERS = ("hf_fused", "hf")
"""The formats whose names transformers' modules and parameters have."""

Pair = tuple[np.ndarray, np.ndarray]
"""A and B."""


def write_peft(
    folder: Path, adapters: Mapping[str, np.ndarray], pet: PetSection, base: str | None
) -> None:
    """Write adapters, under our names, as adapter_config.json and adapter_model.safetensors.

    What stands in these two files is replaced.

    Args:
        folder: made when missing.
        adapters: every A and B of the network.
        pet: rank and scale.
        base: what PEFT is told of the weights that they are for.
    """
    export = _Export(adapters)
    for layer in sorted({layer for name in adapters if (layer := layer_of(name)) is not None}):
        export.add_layer(layer)
    tensors = [outgoing(name, np.ascontiguousarray(a)) for name, a in export.tensors.items()]
    with write_aside(folder / TENSORS_FILE) as aside:
        write_safetensors(aside, tensors, {"format": "pt"})
    with write_aside(folder / CONFIG_FILE) as aside:
        config = _config(export, pet, base)
        aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Export:
    """What becomes of each layer's adapters."""

    def __init__(self, adapters: Mapping[str, np.ndarray]) -> None:
        self._adapters = adapters
        self.tensors: dict[str, np.ndarray] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self.doubled: list[str] = []
        """Parameters whose adapter has twice the rank."""

    def add_layer(self, layer: int) -> None:
        """Take over the adapters of one layer."""
        for row, lora in adaptable_rows():
            if row.expert_axis is None and (pair := self._pair(row, layer)):
                module, parameter = transformers_names(row, layer)
                self._put(module, pair)
                if lora.peft == "module":
                    self.modules.append(module)
                else:
                    self.parameters.append(parameter)
        self._add_experts(layer)

    def _add_experts(self, layer: int) -> None:
        """One wrapper lies in the other: gate_up_proj's in down_proj's, where both are there."""
        gate, down, up = (self._pair(row, layer) for row in (EXPERT_GATE, EXPERT_DOWN, EXPERT_UP))
        module, gate_up = transformers_names(EXPERT_GATE, layer)
        if one := gate or up:
            inner = f"{module}.base_layer" if down else module
            self._put(inner, _flat(_joined(one, gate, up)))
            self.parameters.append(gate_up)
            self.doubled.append(gate_up)
        if down:
            self._put(module, _flat(down))
            self.parameters.append(transformers_names(EXPERT_DOWN, layer)[1])

    def _pair(self, row: ParameterRow, layer: int) -> Pair | None:
        module = row.module.format(layer=layer)
        if module + LORA_A not in self._adapters:
            return None
        return self._adapters[module + LORA_A], self._adapters[module + LORA_B]

    def _put(self, module: str, pair: Pair) -> None:
        for letter, array in zip("AB", pair, strict=True):
            self.tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = array


def transformers_names(row: ParameterRow, layer: int) -> tuple[str, str]:
    """transformers' module that has a parameter, and the parameter."""
    stored = row.stored(*_TRANSFORMERS)
    if stored is None:
        raise UserError(f"transformers has no name for {row.at(layer)}, so PEFT's format has none")
    name = stored.name.format(layer=layer)
    return name.rpartition(".")[0], name


def _joined(one: Pair, gate: Pair | None, up: Pair | None) -> Pair:
    """The adapter of w1 above w3; `one` of them is there, an absent one is of zeros."""
    a_ErD, b_EFr = one
    experts, width, rank = b_EFr.shape
    a = np.zeros((experts, 2 * rank, a_ErD.shape[2]), np.float32)
    b = np.zeros((experts, 2 * width, 2 * rank), np.float32)
    for index, pair in enumerate((gate, up)):
        if pair:
            a[:, index * rank : (index + 1) * rank] = pair[0]
            rows = slice(index * width, (index + 1) * width)
            b[:, rows, index * rank : (index + 1) * rank] = pair[1]
    return a, b


def _flat(pair: Pair) -> Pair:
    """A (E, r, in) -> (E * r, in); B (E, out, r) -> (out, r * E)."""
    a, b = pair
    return a.reshape(-1, a.shape[2]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _config(export: _Export, pet: PetSection, base: str | None) -> dict[str, Any]:
    rank, alpha = pet.lora_rank, pet.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        # peft cannot drop inputs where it adapts parameters
        "lora_dropout": 0.0 if export.parameters else pet.lora_dropout,
        "target_modules": export.modules,
        "target_parameters": export.parameters or None,
        "rank_pattern": {name.replace(".", r"\."): 2 * rank for name in export.doubled},
        "alpha_pattern": {name.replace(".", r"\."): 2 * alpha for name in export.doubled},
    }
