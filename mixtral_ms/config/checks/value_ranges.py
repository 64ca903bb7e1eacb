"""Ranges of single numbers, as one table."""

import dataclasses
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

from mixtral_ms.config.sections.parallel_section import HcclBuffers
from mixtral_ms.config.sections.run_section import RunConfig

_MAX_SEED = 2**32 - 1
_MOST_PARTS = 10_000  # each is gone through one by one; a damaged file may say any number

# key, lowest, highest (None: no bound); a bound written "<1" leaves the bound itself out
_RANGES: tuple[tuple[str, float | str | None, float | str | None], ...] = (
    ("seed", 0, _MAX_SEED),
    ("eval_step_interval", -1, None),
    ("eval_epoch_interval", -1, None),
    ("predict_batch_size", 1, None),
    ("runner_config.epochs", 1, None),
    ("runner_config.batch_size", 1, None),
    ("runner_config.gradient_accumulation_steps", 1, None),
    ("runner_config.global_batch_size", 1, None),
    ("runner_config.max_steps", 1, None),
    ("runner_config.stop_at_step", 1, None),
    ("runner_config.peak_tflops", ">0", None),
    ("runner_wrapper.max_skipped_steps", 1, None),
    *(
        (f"parallel_config.hccl_buffer_size.{kind.name}", 1, None)
        for kind in dataclasses.fields(HcclBuffers)
    ),
    ("optimizer.learning_rate", 0, None),
    ("optimizer.beta1", 0, "<1"),
    ("optimizer.beta2", 0, "<1"),
    ("optimizer.eps", ">0", None),
    ("optimizer.weight_decay", 0, "<1"),
    ("lr_schedule.learning_rate", 0, None),
    ("lr_schedule.lr_end", 0, None),
    ("lr_schedule.warmup_lr_init", 0, None),
    ("lr_schedule.warmup_ratio", 0, "<1"),
    ("lr_schedule.warmup_steps", 0, None),
    ("lr_schedule.total_steps", -1, None),
    ("lr_schedule.num_cycles", ">0", None),
    ("runner_wrapper.max_grad_norm", ">0", None),
    ("runner_wrapper.max_skipped_steps", 1, None),
    ("runner_config.peak_tflops", ">0", None),
    ("runner_wrapper.scale_sense.loss_scale_value", ">0", None),
    ("runner_wrapper.scale_sense.scale_factor", ">1", None),
    ("runner_wrapper.scale_sense.scale_window", 1, None),
    ("runner_wrapper.scale_sense.min_loss_scale", ">0", None),
    ("context.device_id", 0, 4095),
    ("parallel.gradient_bucket_mb", 0, 2047),
    ("parallel_config.data_parallel", 1, None),
    ("parallel_config.model_parallel", 1, None),
    ("parallel_config.expert_parallel", 1, None),
    ("parallel_config.pipeline_stage", 1, None),
    ("parallel_config.context_parallel", 1, None),
    ("parallel_config.micro_batch_num", 1, None),
    ("moe_config.expert_num", 1, _MOST_PARTS),
    ("moe_config.num_experts_chosen", 1, None),
    ("moe_config.aux_loss_factor", 0, None),
    ("moe_config.z_loss_factor", 0, None),
    ("moe_config.router_jitter", 0, "<1"),
    ("moe_config.comp_comm_parallel_degree", 2, None),
    ("model.model_config.batch_size", 1, None),
    ("model.model_config.seq_length", 1, None),
    ("model.model_config.hidden_size", 1, None),
    ("model.model_config.num_layers", 1, _MOST_PARTS),
    ("model.model_config.num_heads", 1, None),
    ("model.model_config.n_kv_heads", 1, None),
    ("model.model_config.vocab_size", 1, None),
    ("model.model_config.intermediate_size", 1, None),
    ("model.model_config.multiple_of", 1, None),
    ("model.model_config.ffn_dim_multiplier", ">0", None),
    ("model.model_config.max_position_embedding", 1, None),
    ("model.model_config.rms_norm_eps", ">0", "<1"),
    ("model.model_config.theta", 1, 1e12),
    ("model.model_config.init_method_std", ">0", None),
    ("model.model_config.sliding_window", 1, None),
    ("model.model_config.block_size", 1, None),
    ("model.model_config.num_blocks", 1, None),
    ("model.model_config.top_k", 0, None),
    ("model.model_config.top_p", ">0", 1),
    ("model.model_config.temperature", 0, None),
    ("model.model_config.repetition_penalty", ">0", None),
    ("model.model_config.max_decode_length", 1, None),
    ("model.model_config.max_new_tokens", 1, None),
    ("model.model_config.pet_config.lora_rank", 1, None),
    ("model.model_config.pet_config.lora_alpha", ">0", None),
    ("model.model_config.pet_config.lora_dropout", 0, "<1"),
    ("generation.min_p", 0, 1),
    ("generation.num_beams", 1, 64),
)
_SECTION_RANGES: dict[str, tuple[tuple[str, float | str | None, float | str | None], ...]] = {
    "train_dataset": (("batch_size", 1, None), ("data_loader.num_samples", 1, None)),
    "eval_dataset": (("batch_size", 1, None), ("data_loader.num_samples", 1, None)),
    "MFLossMonitor": (("per_print_times", 1, None),),
    "CheckpointMonitor": (
        ("save_checkpoint_steps", 1, None),
        ("save_checkpoint_seconds", 0, None),
        ("keep_checkpoint_max", 1, None),
    ),
    "SampleMonitor": (("rows", 1, 64), ("max_new_tokens", 1, None)),
    "MetricsWriter": (("per_layer_steps", 1, None),),
}
_MEMORY_SIZE = re.compile(r"\d+(\.\d+)?GB")


def find_non_finite(config: RunConfig) -> list[str]:
    """Keys that hold nan or inf (a configuration made in Python is not read from YAML)."""
    return [
        f"{path} is {value}: it must be a finite number"
        for path, value in _walk(config, "")
        if isinstance(value, float) and not math.isfinite(value)
    ]


def out_of_range(config: RunConfig) -> list[str]:
    """Numbers outside what they can mean."""
    problems = [
        _range_problem(config, path, path, lowest, highest) for path, lowest, highest in _RANGES
    ]
    for name in ("train_dataset", "eval_dataset"):
        problems += _section_problems(getattr(config, name), name, name)
    for index, callback in enumerate(config.callbacks):
        problems += _section_problems(callback, callback.type, f"callbacks.{index}")
    problems += [
        _beta_problem(index, beta) for index, beta in enumerate(config.optimizer.betas or [])
    ]
    size = config.context.max_device_memory
    if not _MEMORY_SIZE.fullmatch(size):
        problems.append(f'context.max_device_memory is {size!r}: write a size such as "58GB"')
    return [problem for problem in problems if problem]


def _section_problems(section: Any, kind: str, prefix: str) -> list[str | None]:
    return [
        _range_problem(section, key, f"{prefix}.{key}", lowest, highest)
        for key, lowest, highest in _SECTION_RANGES.get(kind, ())
    ]


def _range_problem(
    root: Any, path: str, shown: str, lowest: float | str | None, highest: float | str | None
) -> str | None:
    value = _get(root, path)
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    above, below = _bound(lowest, "at least"), _bound(highest, "at most")
    if (above is None or above[0](value)) and (below is None or below[0](value)):
        return None
    wanted = " and ".join(bound[1] for bound in (above, below) if bound)
    return f"{shown} is {value}: it must be {wanted}"


def _bound(limit: float | str | None, words: str) -> tuple[Any, str] | None:
    """A test for one bound and how to say it."""
    if limit is None:
        return None
    if isinstance(limit, str):
        number = float(limit[1:])
        compare = operator.gt if limit[0] == ">" else operator.lt
        said = "more than" if limit[0] == ">" else "less than"
        return (lambda value: compare(value, number)), f"{said} {number:g}"
    compare = operator.ge if words == "at least" else operator.le
    return (lambda value: compare(value, limit)), f"{words} {limit}"


def _beta_problem(index: int, beta: float) -> str | None:
    if 0 <= beta < 1:
        return None
    return f"optimizer.betas.{index} is {beta}: it must be at least 0 and less than 1"


def _get(root: Any, path: str) -> Any:
    for key in path.split("."):
        root = getattr(root, key, None)
    return root


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            below = f"{path}.{field.name}" if path else field.name
            yield from _walk(getattr(value, field.name), below)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}.{index}")
    else:
        yield path, value
