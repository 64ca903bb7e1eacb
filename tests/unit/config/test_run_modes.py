"""Run modes are one table, and nothing else lists or compares them."""

import ast
from pathlib import Path
from typing import get_args

import pytest

import mixtral_ms
from mixtral_ms.config import RunConfig
from mixtral_ms.config.sections.run_modes import RUN_MODES, RunModeName
from mixtral_ms.train.trainer import Trainer

PACKAGE = Path(mixtral_ms.__file__).parent
OTHERS = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "config/sections/run_modes.py"})


def constants(node):
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & set(RUN_MODES)


def spelled_modes(source):
    """Lines with a collection of modes, or a run_mode compared with one by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            found = len(constants(node)) > 1
        elif isinstance(node, ast.Compare):
            found = bool(constants(node)) and "run_mode" in ast.unparse(node)
        else:
            continue
        if found:
            yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        'x = config.run_mode in ("train", "finetune")',
        'x = config.run_mode in {"eval"}',
        'if config.run_mode != "predict": pass',
        'MODES = ["train", "eval"]',
        'y: Literal["train", "predict"]',
    ],
)
def test_a_second_list_is_seen(source):
    assert list(spelled_modes(source))


def test_nothing_else_lists_or_compares_them():
    found = {str(path): list(spelled_modes(path.read_text(encoding="utf-8"))) for path in OTHERS}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_table_has_a_row_for_each_name_and_a_method_for_each_row():
    assert tuple(RUN_MODES) == get_args(RunModeName)
    config = RunConfig()
    for name, mode in RUN_MODES.items():
        config.run_mode = name
        assert config.mode is mode
        assert all(hasattr(config, section) for section in mode.datasets)
        assert callable(getattr(Trainer, mode.action))
