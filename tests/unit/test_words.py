"""A search for the field's words finds the code, and a public name stands for one thing."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import mixtral_ms

PACKAGE = Path(mixtral_ms.__file__).parent
ROOT = PACKAGE.parent

# Where a docstring's first line has a word, as `grep -ri` finds it.
HOMES = {
    "KV cache": (
        "infer/engine/engine.py",
        "infer/engine/block_pool.py",
        "infer/engine/scheduler.py",
        "infer/runners/base.py",
        "infer/runners/cpp_runner.py",
        "infer/runners/graph_network.py",
    ),
    "continuous batching": ("infer/engine/engine.py", "infer/engine/scheduler.py"),
    "gradient accumulation": (
        "train/step/gradients.py",
        "train/step/pipeline_gradients.py",
        "train/step/train_step.py",
    ),
    "gradient reduction": ("parallel/comm/gradient_reduction.py",),
    "all-to-all": (
        "model/moe/expert_parallel.py",
        "parallel/comm/collectives.py",
        "parallel/comm/transports.py",
    ),
    "token dispatch": (
        "model/moe/token_dispatch.py",
        "model/moe/context_dispatch.py",
        "model/moe/expert_parallel.py",
        "model/moe/routed_experts.py",
    ),
    "expert parallel": ("model/moe/expert_parallel.py",),
    "padding mask": ("model/mixtral.py",),
    "sequence parallel": ("parallel/comm/collectives.py",),
    "tensor-parallel region": ("parallel/comm/collectives.py",),
    "micro batch": ("train/step/gradients.py", "parallel/pipeline_schedule.py"),
    "pipeline stage": (
        "config/derived/pipeline_stages.py",
        "parallel/pipeline_schedule.py",
        "train/step/pipeline_gradients.py",
    ),
}

# What every command has, and a type variable wherever one is needed.
SHARED = {"main", "command", "T"}


def first_lines(source):
    """First lines of the docstrings of a module and of all classes and functions in it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text.splitlines()[0]


def public_names(source):
    """Classes, functions and constants that a module defines, imported ones left out."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [one.id for top in targets for one in ast.walk(top) if _is_new(one)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def _is_new(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def doubles(modules):
    """Names that several of the modules (name -> source) define, with those."""
    found = defaultdict(list)
    for module, source in modules.items():
        for name in set(public_names(source)) - SHARED:
            found[name].append(module)
    return {name: where for name, where in found.items() if len(where) > 1}


@pytest.mark.parametrize("word", HOMES)
def test_a_search_for_a_word_finds_where_it_is(word):
    missing = [
        file
        for file in HOMES[word]
        if not any(
            word.lower() in line.lower()
            for line in first_lines((PACKAGE / file).read_text(encoding="utf-8"))
        )
    ]
    assert missing == []


def test_a_word_in_no_first_line_is_missed():
    source = '"""A module.\n\nWith a KV cache.\n"""\n\n\ndef f():\n    """KV cache."""\n'
    assert list(first_lines(source)) == ["A module.", "KV cache."]


def test_a_public_name_is_defined_once():
    modules = {
        str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert doubles(modules) == {}, "give each of the things a name of its own"


def test_a_name_of_two_things_is_seen():
    modules = {
        "a": "class Plan: pass\n_own = 1\ndef main(): pass\nfrom c import Loader",
        "b": "Plan, (other, _) = None, (1, 2)\n_own = 2\ndef main(): pass\nfrom c import Loader",
    }
    assert doubles(modules) == {"Plan": ["a", "b"]}


def test_what_the_glossary_says_of_ours_is_there():
    """Names in the first column of its tables that look like code stand in the package."""
    package = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    ours = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    names = {name for cell in ours for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) > 40
    assert sorted(one for one in names if not re.search(rf"\b{one}\b", package)) == []
