"""Contradictions in how a run trains: batches, schedule, optimizer, callbacks, evaluation."""

from collections.abc import Iterator

from mixtral_ms.config.loading.resolve import effective_parallel, sequences_per_micro_step
from mixtral_ms.config.loading.section_builder import nearest
from mixtral_ms.config.sections.run_section import RunConfig

_COLUMNS = ("input_ids", "labels", "segment_ids")


def check_training(config: RunConfig) -> Iterator[str]:
    """What is wrong with the sections a training run reads."""
    yield from _check_batch(config)
    yield from _check_steps(config)
    yield from _check_optimizer(config)
    yield from _check_schedule(config)
    yield from _check_loss_scale(config)
    yield from _check_columns(config)
    yield from _check_callbacks(config)
    yield from _check_evaluation(config)


def _check_batch(config: RunConfig) -> Iterator[str]:
    runner = config.runner_config
    wanted, sequences = runner.global_batch_size, sequences_per_micro_step(config)
    if wanted is None:
        return
    made_of = _sequences_in_words(config)
    if wanted % sequences:
        yield (
            f"runner_config.global_batch_size {wanted} is not divisible by {made_of} = {sequences}"
        )
    elif wanted != sequences * runner.gradient_accumulation_steps:
        yield (
            f"runner_config.global_batch_size {wanted} is not {made_of} * "
            f"gradient_accumulation_steps {runner.gradient_accumulation_steps} = "
            f"{sequences * runner.gradient_accumulation_steps}: leave one of the two keys out"
        )


def _sequences_in_words(config: RunConfig) -> str:
    grid = effective_parallel(config)
    words = f"runner_config.batch_size {config.runner_config.batch_size}"
    words += f" * data_parallel {grid.data_parallel}"
    if grid.pipeline_stage > 1:
        words += f" * micro_batch_num {grid.micro_batch_num}"
    return words


def _check_steps(config: RunConfig) -> Iterator[str]:
    runner = config.runner_config
    name = config.resume_training
    if isinstance(name, str) and (not name or name.lower() in {"true", "false"}):
        yield f"resume_training is the text {name!r}: write True or False without quotes, or a name"
    if runner.max_steps and runner.stop_at_step and runner.stop_at_step > runner.max_steps:
        yield (
            f"runner_config.stop_at_step {runner.stop_at_step} is more than "
            f"runner_config.max_steps {runner.max_steps}: it would never stop there"
        )


def _check_optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    betas = optimizer.betas
    if betas is not None and len(betas) != 2:
        yield f"optimizer.betas has {len(betas)} numbers: it must have 2, [0.9, 0.95] for example"
        return
    for index, key in enumerate(("beta1", "beta2")):
        single = getattr(optimizer, key)
        if betas is not None and single is not None and single != betas[index]:
            yield f"optimizer.{key} {single} contradicts optimizer.betas {betas}: give one of them"
    if config.mode.trains and config.lr_schedule is None and optimizer.learning_rate is None:
        yield "neither lr_schedule.learning_rate nor optimizer.learning_rate is given: give one"


def _check_schedule(config: RunConfig) -> Iterator[str]:
    schedule = config.lr_schedule
    if schedule is None:
        return
    if schedule.warmup_ratio is not None and schedule.warmup_steps is not None:
        yield (
            f"lr_schedule.warmup_ratio {schedule.warmup_ratio} and lr_schedule.warmup_steps "
            f"{schedule.warmup_steps} are both given: give one of them"
        )
    if schedule.total_steps == 0:
        yield "lr_schedule.total_steps is 0: it must be -1 (the steps of this run) or 1 or more"
    spans = {
        "lr_schedule.total_steps": schedule.total_steps,
        "runner_config.max_steps": config.runner_config.max_steps,
    }
    for key, steps in spans.items():
        if schedule.warmup_steps and steps and 0 < steps < schedule.warmup_steps:
            yield f"lr_schedule.warmup_steps {schedule.warmup_steps} is more than {key} {steps}"
    falls = schedule.type != "ConstantWarmUpLR"
    if falls and schedule.lr_end > schedule.learning_rate:
        yield (
            f"lr_schedule.lr_end {schedule.lr_end} is more than lr_schedule.learning_rate "
            f"{schedule.learning_rate}, from which {schedule.type} falls"
        )


def _check_loss_scale(config: RunConfig) -> Iterator[str]:
    scale = config.runner_wrapper.scale_sense
    if isinstance(scale, float):
        if scale <= 0:
            yield f"runner_wrapper.scale_sense is {scale}: a loss scale must be more than 0"
    elif scale is not None and scale.loss_scale_value < scale.min_loss_scale:
        yield (
            f"runner_wrapper.scale_sense.loss_scale_value {scale.loss_scale_value} is less than "
            f"min_loss_scale {scale.min_loss_scale}"
        )


def _check_columns(config: RunConfig) -> Iterator[str]:
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(config, name)
        if dataset is None:
            continue
        for index, column in enumerate(dataset.input_columns):
            if column not in _COLUMNS:
                close = nearest(column, _COLUMNS)
                advice = f"; did you mean {close}?" if close else ""
                yield (
                    f"{name}.input_columns.{index} is {column!r}: it must be one of "
                    f"{', '.join(_COLUMNS)}{advice}"
                )
        if "input_ids" not in dataset.input_columns:
            yield f"{name}.input_columns {dataset.input_columns} lacks 'input_ids'"


def _check_callbacks(config: RunConfig) -> Iterator[str]:
    seen: dict[type, int] = {}
    for index, callback in enumerate(config.callbacks):
        first = seen.setdefault(type(callback), index)
        if first != index:
            yield f"callbacks.{first} and callbacks.{index} are both {callback.type}: keep one"
        prefix = getattr(callback, "prefix", "x")
        if not prefix or "/" in prefix or prefix.startswith("."):
            yield (
                f"callbacks.{index}.prefix is {prefix!r}: it must be a word that can begin a "
                "folder's name"
            )


def _check_evaluation(config: RunConfig) -> Iterator[str]:
    for key in ("eval_step_interval", "eval_epoch_interval"):
        if getattr(config, key) == 0:
            yield f"{key} is 0: it must be -1 (never) or 1 or more"
    if config.do_eval and config.eval_step_interval == config.eval_epoch_interval == -1:
        yield "do_eval is True, but eval_step_interval and eval_epoch_interval are both -1: set one"
