"""The package's shape: imports run one way, modules stay short, light imports stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixtral_ms

PACKAGE = Path(mixtral_ms.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400

# Highest first; a package may import those further down, packages side by side not each other.
LAYERS = (
    ("cli", "integrations"),
    ("train",),
    ("infer", "evaluate"),
    ("convert",),
    ("checkpoint",),
    ("model",),
    ("kernels",),
    ("parallel",),
    ("config",),
)
FOUNDATION = {"errors", "log", "files", "progress"}
LEVEL = {package: level for level, layer in enumerate(LAYERS) for package in layer}


def may_import(importer, imported):
    if imported == importer or imported in FOUNDATION:
        return True
    if importer in FOUNDATION:
        return False
    if importer == "data":
        return imported == "config"
    if imported == "data":
        return LEVEL[importer] < LEVEL["checkpoint"]
    return LEVEL[importer] < LEVEL[imported]


def imported_packages(source):
    """First-level packages of mixtral_ms that a module imports, wherever in it, with lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["mixtral_ms.<relative>"]
        elif isinstance(node, ast.ImportFrom):
            own = node.module == "mixtral_ms"
            names = [f"mixtral_ms.{a.name}" for a in node.names] if own else [node.module]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "mixtral_ms":
                yield rest.partition(".")[0], node.lineno


def wrong_imports(package, source):
    return [
        (line, found)
        for found, line in imported_packages(source)
        if found not in LEVEL | dict.fromkeys(FOUNDATION | {"data"})
        or not may_import(package, found)
    ]


def package_of(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if first in ("__init__", "__main__") else first


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert wrong_imports(package_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "package, source",
    [
        ("kernels", "from mixtral_ms.model.moe import Moe"),
        ("kernels", "def f():\n    import mixtral_ms.data.loader"),
        ("data", "from mixtral_ms.model import mixtral"),
        ("infer", "from mixtral_ms.train.trainer import Trainer"),
        ("infer", "from mixtral_ms.evaluate.perplexity import anything"),
        ("config", "from mixtral_ms import train"),
        ("errors", "from mixtral_ms.config import load_config"),
        ("model", "from . import moe"),
        ("cli", "from mixtral_ms.nowhere import anything"),
    ],
)
def test_wrong_imports_are_seen(package, source):
    assert len(wrong_imports(package, source)) == 1


def test_modules_stay_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {str(path): count for path, count in lines.items() if count > MOST_LINES}
    assert long == {}, "give a long module's second job a file of its own"


@pytest.mark.parametrize(
    "statement, unwanted",
    [
        ("import mixtral_ms", "mindspore torch transformers mindformers matplotlib pyarrow"),
        (
            "from mixtral_ms import load_config; import mixtral_ms.cli.run",
            "mindspore torch transformers mindformers matplotlib pyarrow",
        ),
        ("from mixtral_ms import MixtralForCausalLM, Trainer", "torch transformers mindformers"),
    ],
)
def test_light_imports_stay_light(statement, unwanted):
    code = f"{statement}; import sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert "mixtral_ms" in done.stdout
    assert set(done.stdout.split()) & set(unwanted.split()) == set()
