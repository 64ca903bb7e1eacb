"""YAML file and overrides -> `RunConfig`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.config.loading.overrides import Override, apply_override, parse_override
from mixtral_ms.config.loading.resolve import resolve
from mixtral_ms.config.loading.section_builder import SectionBuilder, to_python
from mixtral_ms.config.loading.yaml_tree import Value, read_tree
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

_MOST_ERRORS = 50


def load_config(path: str | Path, overrides: Sequence[str | Override] = ()) -> RunConfig:
    """Read a run's YAML, MindFormers' or ours, into typed sections.

    `overrides` are `"section.key=value"`, applied in turn; the value is YAML and an item of a
    list is named by its number. Keys that have no effect here give one log line each.
    `check_config` finds contradictions between keys; this finds wrong keys and types.

    Raises:
        UserError: naming each mistake with its file and line (or flag) and full key.
    """
    tree = read_tree(path)
    dataset_aliases = _aliased_datasets(tree)
    for override in overrides:
        if isinstance(override, str):
            override = parse_override(override)  # noqa: PLW2901
        tree = apply_override(tree, override)
    tree = _follow_aliases(tree, dataset_aliases)
    builder = SectionBuilder(RunConfig)
    config = builder.section(RunConfig, tree)
    builder.errors += _given_twice(tree)
    if builder.errors:
        raise UserError(_joined(builder.errors, str(path)))
    for notice in dict.fromkeys(builder.notices):
        get_logger().info(notice)
    return resolve(config, moe_given_at_top="moe_config" in tree.data)


def _aliased_datasets(tree: Value) -> list[str]:
    """Which of train_dataset and eval_dataset their `_task` section takes by `*alias`."""
    names = ("train_dataset", "eval_dataset")
    return [name for name in names if name in tree.data and _same(tree, (name,), _task_path(name))]


def _follow_aliases(tree: Value, names: list[str]) -> Value:
    """Give the `_task` section the data set as it is after the overrides."""
    for name in names:
        task = tree.data[f"{name}_task"]
        if not isinstance(task.data, dict) or tree.data[name].data is None:
            continue  # an override took the section away
        inner = {**task.data, "dataset_config": tree.data[name]}
        task = dataclasses.replace(task, data=inner)
        tree = dataclasses.replace(tree, data={**tree.data, f"{name}_task": task})
    return tree


def _task_path(name: str) -> tuple[str, ...]:
    return (f"{name}_task", "dataset_config")


def _find(tree: Value, path: tuple[str, ...]) -> Value | None:
    node: Value | None = tree
    for key in path:
        node = node.data.get(key) if node and isinstance(node.data, dict) else None
    return node


def _same(tree: Value, first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    one, two = _find(tree, first), _find(tree, second)
    return one is not None and two is not None and one.data is two.data


def _given_twice(tree: Value) -> list[str]:
    """Sections that one may write in two places, but not differently."""
    pairs = [
        (("moe_config",), ("model", "model_config", "moe_config")),
        (("train_dataset",), _task_path("train_dataset")),
        (("eval_dataset",), _task_path("eval_dataset")),
    ]
    errors = []
    for first, second in pairs:
        one, two = _find(tree, first), _find(tree, second)
        if one is not None and two is not None and to_python(one) != to_python(two):
            errors.append(
                f"{two.where}: {'.'.join(second)} and {'.'.join(first)} ({one.where}) differ: "
                "give one of them, or make one an alias of the other"
            )
    return errors


def _joined(errors: list[str], path: str) -> str:
    errors = list(dict.fromkeys(errors))
    if len(errors) == 1:
        return errors[0]
    lines = [f"  {error}" for error in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        lines.append(f"  … and {len(errors) - _MOST_ERRORS} more")
    return "\n".join([f"{len(errors)} mistakes in {path}:", *lines])
