"""What `--check_config` prints: the resolved configuration and what it will need."""

from pathlib import Path

from mixtral_ms.config import RunConfig
from mixtral_ms.config.checks.check_paths import check_paths
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.config.loading.resolve import rank_count, sequences_per_micro_step
from mixtral_ms.convert.run_weights import find_run_weights, run_tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.sharding_rules import active_parameter_count, parameter_count
from mixtral_ms.parallel.planner.memory_model import (
    format_bytes,
    format_memory_plan,
    memory_plan,
)
from mixtral_ms.parallel.planner.predict_memory import format_predict_memory, predict_memory


def describe(config: RunConfig) -> str:
    """The resolved YAML, parameter count, batch, memory of each rank, and files still missing."""
    model = config.model.model_config
    lines = [
        render_config(config),
        f"parameters: {parameter_count(model):,}, of which a token meets "
        f"{active_parameter_count(model):,}",
        f"ranks: {rank_count(config)}",
    ]
    if config.mode.trains:
        lines.append(_batch(config))
    lines += ["memory of each rank, estimated:", *_memory(config)]
    if config.context.device_target == "Ascend":
        lines.append(
            "its graphs, compiled without a device: python -m mixtral_ms check-graphs --help"
        )
    missing = [*check_paths(config), *_missing_for_prediction(config)]
    if missing:
        lines.append("before this runs:")
        lines += [f"  {problem}" for problem in missing]
    return "\n".join(lines)


def _missing_for_prediction(config: RunConfig) -> list[str]:
    """What prediction would say of weights and tokenizer, beyond paths that do not exist."""
    named = (config.load_checkpoint, config.src_strategy_path_or_dir)
    if not config.mode.answers or not all(Path(one).exists() for one in named if one):
        return []
    try:
        run_tokenizer(config, find_run_weights(config))
    except UserError as error:
        return [str(error)]
    return []


def _batch(config: RunConfig) -> str:
    sequences = sequences_per_micro_step(config) * config.runner_config.gradient_accumulation_steps
    tokens = sequences * config.model.model_config.seq_length
    return f"one step: {sequences:,} sequences, {tokens:,} tokens"


def _memory(config: RunConfig) -> list[str]:
    """The plan, and what will not fit what an Ascend device may use."""
    if config.mode.answers:
        memory = predict_memory(config)
        needs = [("each rank", memory.total)]
        table, help_text = format_predict_memory(memory), "more ranks or a smaller weight_dtype"
    else:
        plan = memory_plan(config)
        needs = [(f"stage {rank.stage}", rank.total) for rank in plan]
        table, help_text = format_memory_plan(plan), "more ranks, recompute or a smaller batch_size"
    if config.context.device_target != "Ascend":
        return [table]
    limit = float(config.context.max_device_memory.removesuffix("GB")) * 2**30
    return [table] + [
        f"{who} needs {format_bytes(size)}, but context.max_device_memory is "
        f"{config.context.max_device_memory}: {help_text} help"
        for who, size in needs
        if size > limit
    ]
