"""What is allowed and yet seldom meant: each is one line of the log when a run starts."""

from collections.abc import Iterator

from mixtral_ms.config.loading.resolve import micro_batch_size
from mixtral_ms.config.sections.model_section import NO_TOKEN
from mixtral_ms.config.sections.parallel_section import GRID_SIZES
from mixtral_ms.config.sections.run_section import RunConfig


def remarks(config: RunConfig) -> Iterator[str]:
    """One line for each trap, and for each given key that another one makes useless."""
    yield from _of_ranks(config)
    if config.mode.datasets:
        yield from _of_tokens(config)
    if config.mode.trains:
        yield from _of_numbers(config)
        yield from _of_keys_that_give_way(config)


def _of_ranks(config: RunConfig) -> Iterator[str]:
    grid, sizes = config.parallel_config, (*GRID_SIZES.values(), "micro_batch_num")
    larger = ", ".join(f"{key} {size}" for key in sizes if (size := getattr(grid, key)) > 1)
    if larger and not config.use_parallel:
        yield f"use_parallel is False: parallel_config's {larger} have no effect"


def _of_tokens(config: RunConfig) -> Iterator[str]:
    """Labels that are padding's id are no targets, and padding takes no part in routing."""
    model = config.model.model_config
    for key, ids, consequence in (
        ("eos_token_id", model.eos_token_ids, "the end of an answer is never learnt"),
        ("bos_token_id", [model.bos_token_id], ""),
    ):
        if model.pad_token_id != NO_TOKEN and model.pad_token_id in ids:
            yield (
                f"model_config.pad_token_id {model.pad_token_id} is {key} too: such labels are no "
                f"targets{consequence and f', so {consequence}'}, and such inputs are not routed. "
                "Give padding an id of its own, or -1 where the records hold none"
            )


def _of_numbers(config: RunConfig) -> Iterator[str]:
    half = config.model.model_config.compute_dtype == "float16"
    if half and config.runner_wrapper.scale_sense is None:
        yield (
            "model_config.compute_dtype float16 without runner_wrapper.scale_sense: small "
            "gradients become 0. Give a loss scale, or compute in bfloat16 or float32"
        )


def _of_keys_that_give_way(config: RunConfig) -> Iterator[str]:
    runner, schedule = config.runner_config, config.lr_schedule
    rate, size = config.optimizer.learning_rate, config.model.model_config.batch_size
    if schedule is not None and rate is not None and rate != schedule.learning_rate:
        yield (
            f"optimizer.learning_rate {rate:g} gives way to lr_schedule.learning_rate "
            f"{schedule.learning_rate:g}"
        )
    if runner.max_steps and runner.epochs != 1:
        yield f"runner_config.epochs {runner.epochs} gives way to max_steps {runner.max_steps}"
    if size not in (1, micro_batch_size(config)):
        yield (
            f"model.model_config.batch_size {size} gives way to runner_config.batch_size "
            f"{micro_batch_size(config)}"
        )
