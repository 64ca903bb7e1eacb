"""Only kernels/ knows which kernels there are: the others ask the choice that they were given."""

import ast
from pathlib import Path

import pytest

import mixtral_ms

PACKAGE = Path(mixtral_ms.__file__).parent
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if "kernels" not in path.parts]
# The choice itself, what it is asked with, and what is known of its answers.
CLASSES = {"KernelChoice", "AttentionSizes", "FusedOperators", "CacheSizes", "Keys"}
CLASSES |= {"PagedCache", "UpdateKernels"}


def kernel_classes(source):
    """Classes and modules of kernels/ that a module imports, but for those that anybody may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [n.name for n in node.names if n.name.startswith("mixtral_ms.kernels")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixtral_ms."):
            for name in (alias.name for alias in node.names):
                place = PACKAGE.parent / Path(*node.module.split("."), name)
                is_module = place.is_dir() or place.with_suffix(".py").is_file()
                inside = f"{node.module}.".startswith("mixtral_ms.kernels.")
                if inside and (is_module or (name[0].isupper() and name not in CLASSES)):
                    found.append(name)
    return found


def compared_names(source):
    """Comparisons that read which kernels somebody has."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Compare, ast.Match))
        and any(_is_kernel_name(part) for part in ast.walk(node))
    ]


def _is_kernel_name(node):
    if isinstance(node, ast.Name):
        return node.id == "kernel_name"
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr == "kernel_name" or (
        node.attr == "name" and ast.unparse(node.value).rpartition(".")[2].endswith("kernels")
    )


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_outside_asks_which_kernels_there_are(path):
    source = path.read_text(encoding="utf-8")
    assert kernel_classes(source) == []
    assert compared_names(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from mixtral_ms.kernels.cells.experts import PackedExperts",
        "from mixtral_ms.kernels.kernel_choice import KernelChoice, NumpyKernels",
        "from mixtral_ms.kernels.cells import experts",
        "from mixtral_ms.kernels import cells",
        "import mixtral_ms.kernels.cells.experts as cells",
        "def f():\n    from mixtral_ms.kernels.ascend.grouped_experts import GroupedExperts",
    ],
)
def test_a_wrong_import_is_seen(source):
    assert len(kernel_classes(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'fast = kernels.name == "numpy"',
        'if self.kernels.name in ("numpy", "C++"): pass',
        'assert network.kernel_name != "ascend"',
        "if kernel_name == other: pass",
        'match kernels.name:\n    case "numpy":\n        pass',
    ],
)
def test_a_wrong_comparison_is_seen(source):
    assert len(compared_names(source)) == 1


def test_what_is_allowed():
    source = (
        "from mixtral_ms.kernels.cells.attention import AttentionSizes\n"
        "from mixtral_ms.kernels.cells.elementwise import swiglu\n"
        "from mixtral_ms.kernels.select import select_kernels\n"
        "log(kernels.name, network.kernel_name)\n"
        'assert path.name == "kernels"\n'
    )
    assert kernel_classes(source) == compared_names(source) == []
