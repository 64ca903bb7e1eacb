"""YAML file and overrides -> `RunConfig`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.config.loading.overrides import Override, apply_override, parse_override
from mixtral_ms.config.loading.resolve import resolve
from mixtral_ms.config.loading.section_builder import MOST_ERRORS, SectionBuilder, to_python
from mixtral_ms.config.loading.yaml_tree import Value, read_tree
from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

_Path = tuple[str, ...]
_SAME_SECTION: tuple[tuple[_Path, _Path], ...] = (
    (("moe_config",), ("model", "model_config", "moe_config")),
    (("train_dataset",), ("train_dataset_task", "dataset_config")),
    (("eval_dataset",), ("eval_dataset_task", "dataset_config")),
)
"""Sections that one may write in two places, but not differently; the first is read."""


def load_config(path: str | Path, overrides: Sequence[str | Override] = ()) -> RunConfig:
    """Read a run's YAML, MindFormers' or ours, into typed sections.

    `overrides` are `"section.key=value"`, applied in turn; the value is YAML and an item of a
    list is named by its number. Keys that have no effect here give one log line each.
    `check_config` finds contradictions between keys; this finds wrong keys and types.

    Raises:
        UserError: naming each mistake with its file and line (or flag) and full key.
    """
    tree = read_tree(path)
    for first, second in _SAME_SECTION:
        tree = _in_one_place(tree, first, second)
    for given in overrides:
        override = parse_override(given) if isinstance(given, str) else given
        tree = apply_override(tree, _where_it_acts(override))
    builder = SectionBuilder(RunConfig)
    config = builder.section(RunConfig, tree)
    builder.errors += _given_twice(tree)
    if builder.errors:
        raise UserError(_joined(builder.errors, str(path)))
    for notice in dict.fromkeys(builder.notices):
        get_logger().info(notice)
    return resolve(config, moe_given_at_top="moe_config" in tree.data)


def _in_one_place(tree: Value, first: _Path, second: _Path) -> Value:
    """Leave a section that the file has in both places, as an alias or alike, in the first."""
    one, two = _find(tree, first), _find(tree, second)
    if two is None or (one is not None and to_python(one) != to_python(two)):
        return tree  # `_given_twice` refuses two that differ
    return _put(_without(tree, second), first, two if one is None else one)


def _where_it_acts(override: Override) -> Override:
    """The same override by the name under which its section is read."""
    path = tuple(override.path.split("."))
    for first, second in _SAME_SECTION:
        if path[: len(second)] == second:
            acting = ".".join((*first, *path[len(second) :]))
            return dataclasses.replace(override, path=acting)
    return override


def _put(tree: Value, path: _Path, value: Value) -> Value:
    key, *rest = path
    below = _put(tree.data[key], tuple(rest), value) if rest else value
    return dataclasses.replace(tree, data={**tree.data, key: below})


def _without(tree: Value, path: _Path) -> Value:
    key, *rest = path
    if rest:
        return _put(tree, (key,), _without(tree.data[key], tuple(rest)))
    return dataclasses.replace(tree, data={k: v for k, v in tree.data.items() if k != key})


def _find(tree: Value, path: _Path) -> Value | None:
    node: Value | None = tree
    for key in path:
        node = node.data.get(key) if node and isinstance(node.data, dict) else None
    return node


def _given_twice(tree: Value) -> list[str]:
    """Sections that one may write in two places, but not differently."""
    errors = []
    for first, second in _SAME_SECTION:
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
    lines = [f"  {error}" for error in errors[:MOST_ERRORS]]
    if len(errors) > MOST_ERRORS:
        lines.append(f"  … and {len(errors) - MOST_ERRORS} more")
    return "\n".join([f"{len(errors)} mistakes in {path}:", *lines])
