"""Contradictions within the network and between it and the rank grid."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace

from mixtral_ms.config.checks.value_ranges import find_non_finite, out_of_range
from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.derived.parameter_table import LAYER, adaptable_rows, adapted_rows
from mixtral_ms.config.derived.pattern_branches import branches
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.derived.recomputed_layers import selected_layers
from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import NO_TOKEN, MixtralConfig
from mixtral_ms.config.sections.run_section import ModelSection, RunConfig
from mixtral_ms.errors import UserError

_MAX_CAPACITY_FACTOR = 64.0


def check_model(config: RunConfig) -> Iterator[str]:
    """What is wrong with model_config and moe_config, and with splitting them."""
    model = config.model.model_config
    yield from _check_attention(model)
    yield from _check_experts(model)
    yield from _check_tokens(model)
    yield from _check_adapters(model)
    yield from _check_split(config)
    yield from _check_stages(config)


def network_problems(network: MixtralConfig) -> list[str]:
    """What is wrong with a network by itself, wherever it was read: numbers and contradictions."""
    run = RunConfig(model=ModelSection(model_config=network), moe_config=network.moe_config)
    if problems := find_non_finite(run) or out_of_range(run):
        return problems
    return [*_check_attention(network), *_check_experts(network), *_check_tokens(network)]


def _divides(value: int, by: int, value_key: str, by_key: str) -> Iterator[str]:
    if value % by:
        yield f"{value_key} {value} is not divisible by {by_key} {by}"


def _check_attention(model: MixtralConfig) -> Iterator[str]:
    heads, kv_heads = model.num_heads, model.n_kv_heads
    yield from _divides(heads, kv_heads, "model_config.num_heads", "model_config.n_kv_heads")
    if model.head_dim < 2 or model.head_dim % 2:
        yield (
            f"model_config.head_dim {model.head_dim} (unless given: hidden_size "
            f"{model.hidden_size} / num_heads {heads}) must be even and at least 2: rotary "
            "embedding turns pairs of values"
        )
    if model.seq_length > model.max_position_embedding:
        yield (
            f"model_config.seq_length {model.seq_length} is longer than "
            f"model_config.max_position_embedding {model.max_position_embedding}"
        )


def _check_experts(model: MixtralConfig) -> Iterator[str]:
    moe = model.moe_config
    if moe.num_experts_chosen > moe.expert_num:
        yield (
            f"moe_config.num_experts_chosen {moe.num_experts_chosen} is more than "
            f"moe_config.expert_num {moe.expert_num}"
        )
    if moe.capacity_factor > _MAX_CAPACITY_FACTOR:
        yield (
            f"moe_config.capacity_factor {moe.capacity_factor} is more than "
            f"{_MAX_CAPACITY_FACTOR:g}: 1 to 4 are usual, 0 or less drops no token"
        )


def _check_tokens(model: MixtralConfig) -> Iterator[str]:
    ids = {"bos_token_id": [model.bos_token_id], "pad_token_id": [model.pad_token_id]}
    for key, tokens in {**ids, "eos_token_id": model.eos_token_ids or [NO_TOKEN]}.items():
        for token in tokens:
            if not NO_TOKEN <= token < model.vocab_size:
                yield (
                    f"model_config.{key} {token} is not in {NO_TOKEN} (there is none) … "
                    f"vocab_size - 1 = {model.vocab_size - 1}"
                )
    if 0 <= model.ignore_token_id < model.vocab_size:
        yield (
            f"model_config.ignore_token_id {model.ignore_token_id} is a token of vocab_size "
            f"{model.vocab_size}: every label of that token would be left out; use -100"
        )


def _check_adapters(model: MixtralConfig) -> Iterator[str]:
    if (pet := model.pet_config) is None:
        return
    given = f"model_config.pet_config.target_modules {pet.target_modules!r}"
    try:
        found = list(adapted_rows(pet, model.num_layers))
    except re.error as error:
        yield f"{given} is not a regular expression: {error}"
        return
    if not found or (unused := _unused_branch(pet, model.num_layers)) is not None:
        given = given if not found else f"{unused!r} in {given}"
        first, *others = (row.module.removeprefix(LAYER) for row, _ in adaptable_rows())
        yield (
            f"{given} means no module: it must match a whole name such as "
            f"{LAYER.format(layer=0)}{first}; the modules of a layer are "
            f"{', '.join([first, *others])}"
        )


def _unused_branch(pet: PetSection, num_layers: int) -> str | None:
    """An alternative of target_modules that means no module; None where all mean some."""
    for branch, alone in branches(pet.target_modules):
        with contextlib.suppress(re.error):  # it refers to a group of a sibling
            if not any(adapted_rows(replace(pet, target_modules=alone), num_layers)):
                return branch
    return None


def _check_split(config: RunConfig) -> Iterator[str]:
    """Everything that is cut must divide."""
    model, grid = config.model.model_config, effective_parallel(config)
    moe, tensor = model.moe_config, grid.model_parallel
    cut = {
        "model_config.num_heads": model.num_heads,
        "model_config.n_kv_heads": model.n_kv_heads,
        "model_config.intermediate_size": model.intermediate_size,
        "model_config.vocab_size": model.vocab_size,
    }
    for key, size in cut.items():
        yield from _divides(size, tensor, key, "parallel_config.model_parallel")
    experts = grid.expert_parallel
    yield from _divides(
        moe.expert_num, experts, "moe_config.expert_num", "parallel_config.expert_parallel"
    )
    try:
        expert_matrix(grid)
    except UserError as error:
        yield str(error)
    split_sequence = grid.context_parallel * (tensor if grid.use_seq_parallel else 1)
    yield from _divides(
        model.seq_length,
        split_sequence,
        "model_config.seq_length",
        "the parallel_config.context_parallel (and use_seq_parallel's model_parallel) product",
    )


def _check_stages(config: RunConfig) -> Iterator[str]:
    model, grid = config.model.model_config, effective_parallel(config)
    try:
        layers = layers_per_stage(model, grid.pipeline_stage)
        selected_layers(config.recompute_config.select_recompute, layers)
    except UserError as error:
        yield str(error)
    if config.mode.answers:
        for key in ("pipeline_stage", "context_parallel"):
            if (size := getattr(grid, key)) > 1:
                yield (
                    f"parallel_config.{key} {size} with run_mode {config.run_mode}: a network that "
                    "answers is split over model_parallel and expert_parallel only: set it to 1"
                )
    idle = grid.pipeline_stage > max(1, grid.micro_batch_num)
    if config.mode.trains and idle:
        yield (
            f"parallel_config.micro_batch_num {grid.micro_batch_num} is less than "
            f"parallel_config.pipeline_stage {grid.pipeline_stage}: stages would stand idle"
        )
