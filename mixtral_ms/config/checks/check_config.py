"""Contradictions between keys, all found before anything is built.

Each check takes the configuration and yields messages; `check_config` gathers them all, so that a
user sees every mistake at once.
"""

from collections.abc import Callable, Iterator

from mixtral_ms.config.checks.check_model import check_model
from mixtral_ms.config.checks.check_paths import check_paths
from mixtral_ms.config.checks.check_training import check_training
from mixtral_ms.config.checks.remarks import remarks
from mixtral_ms.config.checks.value_ranges import find_non_finite, out_of_range
from mixtral_ms.config.loading.resolve import rank_count
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

Check = Callable[[RunConfig], Iterator[str]]


def check_config(
    config: RunConfig, *, world_size: int | None = 1, needs_paths: bool = True
) -> None:
    """Refuse a configuration that contradicts itself or the processes that run it.

    Args:
        config: what `load_config` gave.
        world_size: how many processes there are; None leaves that open, to look at the
            configuration of a cluster from one process.
        needs_paths: whether the files it names must exist.

    Raises:
        UserError: with every contradiction, one a line, each with its keys and numbers.
    """
    problems = find_contradictions(config)
    if world_size is not None:
        problems += _check_world(config, world_size)
    if needs_paths:
        problems += check_paths(config)
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else _numbered(problems))
    for line in remarks(config):
        get_logger().info(line)


def find_contradictions(config: RunConfig) -> list[str]:
    """All contradictions that do not depend on files or on how many processes there are."""
    problems = find_non_finite(config) or out_of_range(config)
    if problems:  # sums over wrong numbers would only repeat the same mistakes
        return problems
    return [*check_model(config), *check_training(config)]


def _check_world(config: RunConfig, world_size: int) -> list[str]:
    """Does the rank grid fit the processes that were started?"""
    needed, grid = rank_count(config), config.parallel_config
    if not config.use_parallel:
        if world_size == 1:
            return []
        return [
            f"use_parallel False, but {world_size} processes were started (MS_WORKER_NUM): set "
            "--use_parallel True, or start one process"
        ]
    if needed != world_size:
        return [
            f"parallel_config.data_parallel {grid.data_parallel} * model_parallel "
            f"{grid.model_parallel} * pipeline_stage {grid.pipeline_stage} * context_parallel "
            f"{grid.context_parallel} = {needed} ranks, but {world_size} "
            f"process{'es were' if world_size > 1 else ' was'} started: change parallel_config, "
            f"start {needed} processes, or set --use_parallel False"
        ]
    return []


def _numbered(problems: list[str]) -> str:
    lines = "\n".join(f"  {index}. {problem}" for index, problem in enumerate(problems, 1))
    return f"{len(problems)} contradictions in the configuration:\n{lines}"
