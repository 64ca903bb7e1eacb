"""The package's shape: imports run one way, modules stay short, light imports stay light."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import mixtral_ms

PACKAGE = Path(mixtral_ms.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in MODULES
}
MOST_LINES, MOST_FILES = 400, 14

# Highest first; a package may import those further down, packages side by side not each other.
LAYERS = (
    ("cli", "integrations", "serve", "bench"),
    ("graphs",),
    ("train",),
    ("evaluate",),
    ("infer",),
    ("convert",),
    ("checkpoint",),
    ("model",),
    ("kernels",),
    ("parallel",),
    ("config",),
)
# The same inside a package, for its folders and the files beside them.
SHELVES = {
    "cli": (("commands",), ("support",)),
    "graphs": (
        ("check_ranks", "graphs_report", "rank_worker"),
        ("results", "step_reads", "run_graphs", "front_end"),
        ("graph_facts", "pretended_device"),
        ("typed_graph",),
    ),
    "train": (
        ("trainer",),
        ("evaluate_mode", "train_mode"),
        ("training_run",),
        ("announcement", "builders"),
        ("sample_answers",),
        ("evaluation",),
        ("report", "state"),
        ("step",),
        ("objectives", "step_plan", "stop_signals"),
    ),
    "infer": (
        ("text_generation_pipeline",),
        ("predict",),
        ("load_model",),
        ("engine",),
        ("runners", "text"),
    ),
    "convert": (("job", "run_weights"), ("formats",), ("adapters",)),
    "checkpoint": (("reshard",), ("store",), ("shards",), ("formats",)),
    "model": (
        ("mixtral",),
        ("lora",),
        ("decoder_layer",),
        ("moe",),
        ("nn",),
    ),
    "kernels": (
        ("select",),
        ("ascend",),
        ("kernel_choice",),
        ("cells",),
        ("native",),
        ("threaded",),
    ),
    "parallel": (("planner", "comm", "pipeline_schedule"), ("grid",)),
    "config": (("checks",), ("loading",), ("derived",), ("sections",)),
    "data": (("loader",), ("conversations", "documents"), ("mindrecord", "readers", "tokenizer")),
    "integrations": (("mindformers",),),
}
FOUNDATION = {
    "errors",
    "log",
    "files",
    "file_sets",
    "printable",
    "progress",
    "file_kind",
    "json_reader",
}
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


def imported_modules(source):
    """Modules of mixtral_ms that a module imports, wherever in it, with lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["mixtral_ms.<relative>"]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in inside]
            if node.module == "mixtral_ms":  # what is not a module there is loaded when used
                names = inside
        else:
            continue
        for name in names:
            if name.startswith("mixtral_ms."):
                yield name, node.lineno


def shelf_of(module):
    """Second part of a module's name: a folder of its package, or a file beside the folders."""
    return (module.split(".") + [""])[2]


def rank_on_shelves(module):
    shelves = SHELVES[module.split(".")[1]]
    return next(level for level, names in enumerate(shelves) if shelf_of(module) in names)


def wrong_imports(module, source):
    return [
        (line, found)
        for found, line in imported_modules(source)
        if not import_is_allowed(module, found)
    ]


def import_is_allowed(module, found):
    importer, imported = package_of(module), found.split(".")[1]
    if imported not in LEVEL | dict.fromkeys(FOUNDATION | {"data"}):
        return False
    shelves = len(module.split(".")) > 2 and importer == imported
    if not shelves or found not in FILES:
        return may_import(importer, imported)
    same_shelf = shelf_of(module) == shelf_of(found)
    return same_shelf or rank_on_shelves(module) < rank_on_shelves(found)


def package_of(module):
    first = (module.split(".") + [""])[1]
    return "cli" if first in ("", "__main__") else first


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    assert wrong_imports(module, FILES[module].read_text(encoding="utf-8")) == []


def test_no_circle():
    modules = {
        module: {found for found, _ in imported_modules(path.read_text(encoding="utf-8"))}
        for module, path in FILES.items()
    }
    for module, found in modules.items():  # a package's __init__ stands for the package
        modules[module] = {name for name in found if name in FILES}
    graphlib.TopologicalSorter(modules).prepare()


def test_a_circle_is_seen():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize(
    "package, source",
    [
        ("kernels", "from mixtral_ms.model.mixtral import MixtralModel"),
        ("kernels", "def f():\n    import mixtral_ms.data.loader"),
        ("kernels.cells.experts", "from mixtral_ms.kernels.select import select_kernels"),
        ("kernels.native.build", "from mixtral_ms.kernels.cells import attention"),
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
    assert len(wrong_imports(f"mixtral_ms.{package}", source)) == 1


def test_a_file_name_occurs_once():
    count = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, times in count.items() if times > 1] == []


def test_folders_stay_small():
    count = Counter(path.parent for path in MODULES)
    crowded = {str(folder): files for folder, files in count.items() if files > MOST_FILES}
    assert crowded == {}, "give a folder's second job a folder of its own"


def test_modules_stay_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {str(path): count for path, count in lines.items() if count > MOST_LINES}
    assert long == {}, "give a long module's second job a file of its own"


@pytest.mark.parametrize(
    "statement, unwanted",
    [
        ("import mixtral_ms", "mindspore torch transformers mindformers matplotlib pyarrow"),
        (
            "from mixtral_ms import load_config; import mixtral_ms.cli.commands.run",
            "mindspore torch transformers mindformers matplotlib pyarrow",
        ),
        (
            "from mixtral_ms import Trainer; import mixtral_ms.cli.support.answers.predict_mode",
            "mindspore torch transformers mindformers matplotlib pyarrow",
        ),
        ("from mixtral_ms import MixtralForCausalLM, Trainer", "torch transformers mindformers"),
    ],
)
@pytest.mark.slow
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
