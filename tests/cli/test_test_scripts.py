"""scripts/test.sh and test_matrix.sh, with a stand-in for Python that notes what it is asked."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
BASH = shutil.which("bash")
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "mkdir", "nproc", "rm", "tail", "timeout")
TOOLS += ("tr",)

STAND_IN = """\
#!/usr/bin/env bash
home=$(cd "$(dirname "$0")" && pwd)
root=${home%%/fake*}
root=${root%%/.venv*}
case "$*" in
  "-c import sys; print"*) echo VERSION; exit 0 ;;
  "-c import sys; sys.exit"* | "-m pip --version") exit 0 ;;
  --version) echo "Python VERSION"; exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
esac
echo "${home#"$root"/} $*" >>"$root/log"
[ ! -e "$root/fail" ] || ! [[ "${home#"$root"/} $*" =~ $(cat "$root/fail") ]] || {
  echo "1 failed in 2.00s"
  exit 1
}
case "$*" in *pytest*) echo "=== 3 passed in 1.00s ===" ;; esac
"""


class Project:
    """A folder with the scripts, and stand-ins for two Pythons on the PATH."""

    def __init__(self, root):
        self.root = root
        (root / "scripts").mkdir(parents=True)
        (root / "fake").mkdir()
        for name in ("test.sh", "test_matrix.sh", "venv.sh"):
            shutil.copy(SCRIPTS / name, root / "scripts" / name)
        for name in ("setup.py", "pyproject.toml"):
            (root / name).write_text("# any")
        for version in ("3.11", "3.12"):
            python = root / "fake" / f"python{version}"
            python.write_text(STAND_IN.replace("VERSION", version))
            python.chmod(0o755)
        for tool in TOOLS:
            (root / "fake" / tool).symlink_to(shutil.which(tool))

    def fail(self, what):
        """What matches this expression fails."""
        (self.root / "fail").write_text(what)

    def run(self, script, *arguments, **variables):
        (self.root / "log").unlink(missing_ok=True)
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return subprocess.run(
            [BASH, str(self.root / "scripts" / script), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.root.parent,
            env={**kept, "PATH": str(self.root / "fake"), **variables},
        )

    @property
    def log(self):
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def parts(text):
    """Names of the parts whose seconds are printed."""
    lines = text.split("== seconds of each part\n")[1].splitlines()
    assert all(line.split()[0].isdigit() and line.split()[1] == "s" for line in lines)
    return [" ".join(line.split()[2:]) for line in lines]


def test_the_tests_print_the_slowest_and_the_seconds_of_each_part(project):
    done = project.run("test.sh", "tests/unit", "-k", "config")
    assert done.returncode == 0, done.stderr
    assert parts(done.stdout) == [
        *("installation", "lint", "format", "types", "tests", "in all"),
    ]
    assert project.log[-1].endswith("--durations=20 --durations-min=1 tests/unit -k config")
    assert any("[mindformers]" in line for line in project.log)


def test_fast_tests_need_one_environment(project):
    assert project.run("test.sh", "--fast").returncode == 0
    assert not any("[mindformers]" in line for line in project.log)
    assert project.log[-1].endswith(" --fast")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (r"pip install .*\[test\]", ["installation", "in all"]),
        (r"pip install .*\[mindformers\]", ["installation", "in all"]),
        ("ruff check", ["installation", "lint"]),
        ("-m pytest", ["installation", "lint", "format"]),
    ],
)
def test_what_fails_ends_the_tests_with_its_status(project, what, told):
    project.fail(what)
    done = project.run("test.sh")
    assert done.returncode == 1
    assert parts(done.stdout)[: len(told)] == told
    assert parts(done.stdout)[-1] == "in all"
    assert any(re.search(what, line) for line in project.log[-2:])


def rows(done):
    """The lines of the table."""
    return done.stdout.split("\nMindSpore ")[1].splitlines()[1:]


def test_every_pair_has_an_environment_of_its_own(project):
    done = project.run("test_matrix.sh", "--mindspore", "2.7.2 2.9.0", "--python", "3.11 3.12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row.split()[:3] for row in rows(done)] == [
        *(["2.7.2", "3.11", "passed"], ["2.7.2", "3.12", "passed"]),
        *(["2.9.0", "3.11", "passed"], ["2.9.0", "3.12", "passed"]),
    ]
    assert "3 passed in 1.00s" in rows(done)[0]
    installed = [line for line in project.log if "pip install" in line]
    assert len(installed) == 4
    assert "mindspore==2.9.0" in installed[-1] and "2.9.0-python-3.12" in installed[-1]
    assert all(
        line.endswith("--dist loadgroup --fast") for line in project.log if "-m pytest" in line
    )


def test_a_python_that_is_not_there_is_said(project):
    done = project.run("test_matrix.sh", "--mindspore", "2.7.2", "--python", "3.10 3.11")
    assert done.returncode == 1
    assert "FAILED" in rows(done)[0]
    assert "no Python 3.10: neither PYTHON310 nor the PATH has it" in rows(done)[0]
    assert rows(done)[1].split()[2] == "passed"
    elsewhere = project.root / "fake" / "ten"
    elsewhere.write_text(STAND_IN.replace("VERSION", "3.10"))
    elsewhere.chmod(0o755)
    named = project.run(
        "test_matrix.sh", "--mindspore", "2.7.2", "--python", "3.10", PYTHON310=str(elsewhere)
    )
    assert named.returncode == 0, named.stdout


def test_one_that_fails_is_named_and_the_others_are_run(project):
    project.fail("2.9.0-python-3.11/bin -m pytest")
    done = project.run("test_matrix.sh", "--python", "3.11", "tests/unit")
    assert done.returncode == 1
    assert [row.split()[2] for row in rows(done)] == ["passed", "FAILED", "passed"]
    assert "1 failed in 2.00s" in rows(done)[1]
    assert project.log[-1].endswith("--dist loadgroup tests/unit")
    project.fail("2.10.0-python-3.11/bin -m pip install")
    done = project.run("test_matrix.sh", "--mindspore", "2.10.0", "--python", "3.11", "--remove")
    assert done.returncode == 0  # it was installed before
    assert not (project.root / ".venv-matrix/mindspore-2.10.0-python-3.11").exists()
    done = project.run("test_matrix.sh", "--mindspore", "2.10.0", "--python", "3.11")
    assert done.returncode == 1 and "not installed" in rows(done)[0]


def test_mindformers_has_an_environment_for_each_mindspore(project):
    done = project.run(
        "test_matrix.sh", "--mindspore", "2.9.0", "--python", "3.11", "--mindformers"
    )
    assert done.returncode == 0, done.stdout
    (line,) = (line for line in project.log if "[mindformers]" in line)
    assert line.startswith(".venv-matrix/mindspore-2.9.0-python-3.11-mindformers/bin ")
    assert line.endswith("mindspore==2.9.0")
    assert project.log[-1].endswith("--dist loadgroup tests/integrations")
