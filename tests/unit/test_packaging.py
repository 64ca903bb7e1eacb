"""setup.py against what the code, the documents and the package's folder hold."""

import ast
import re
import runpy
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mixtral_ms

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mixtral_ms"


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py hands to setuptools."""
    given = {}
    stand_in = SimpleNamespace(setup=given.update, find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement).group()


def test_version_is_the_package_s(metadata):
    assert metadata["version"] == mixtral_ms.__version__


def test_extras_that_errors_name_exist(metadata):
    named = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == (
                "MissingDependencyError"
            ):
                package, extra, _ = (ast.literal_eval(arg) for arg in node.args)
                named[package] = extra
    assert len(named) >= 2
    for package, extra in named.items():
        assert package in map(name_of, metadata["extras_require"].get(extra, [])), (package, extra)


def test_documents_say_why_each_dependency_is_there(metadata):
    text = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    extras = metadata["extras_require"]
    everything = [
        *metadata["install_requires"],
        *(one for extra in extras.values() for one in extra),
    ]
    assert [one for one in everything if f"`{name_of(one)}" not in text] == []
    assert [extra for extra in extras if f"| `{extra}` |" not in text] == []


def test_files_beside_the_modules_are_packaged(metadata):
    patterns = metadata["package_data"]
    missing = []
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        package = ".".join(path.parent.relative_to(ROOT).parts)
        if not any(fnmatch(path.name, pattern) for pattern in patterns.get(package, [])):
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_hooks_before_a_commit_are_what_the_tests_check_and_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    script = (ROOT / "scripts/test.sh").read_text(encoding="utf-8")
    for hook in hooks:
        python, *command = hook["entry"].split(" --")[0].split()
        assert python == ".venv/bin/python"
        assert f'"$VENV_PYTHON" {" ".join(command)}' in script
