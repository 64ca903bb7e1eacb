"""The quick start: its text, its order of commands, and what a second run does.

The order is tested with a stand-in for Python that writes down what it is asked to run; the long
test runs the real thing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
BASH = shutil.which("bash")
TEXT_SCRIPT = SCRIPTS / "quickstart_text.py"

STAND_IN = """\
#!/usr/bin/env bash
home=$(dirname "$0")
case "$*" in
  "-m pip --version") exit 0 ;;
  *--run_mode\\ eval*) kind=evaluate ;;
  *stop_at_step=1*) kind=first_step ;;
  *--predict_data*) kind=generate ;;
  *run_mindformer.py*) kind=train ;;
  *llama_preprocess.py*) kind=preprocess ;;
  *quickstart_text.py*) kind=text ;;
  *"-m pip install"*) kind=install ;;
  *find_example_tokenizer*) echo /somewhere/tokenizer.model; exit 0 ;;
  *) echo "not expected: $*" >&2; exit 99 ;;
esac
echo "$kind $*" >>"$home/log"
if [ "$kind" = evaluate ]; then
  echo "loss 1.0 perplexity $(head -1 "$home/perplexities") tokens 10"
  sed -i 1d "$home/perplexities"
fi
[ ! -e "$home/fail_$kind" ] || exit 1
"""


class Project:
    """A folder with the scripts and a stand-in for .venv/bin/python."""

    def __init__(self, root):
        self.root, self.home = root, root / ".venv" / "bin"
        self.home.mkdir(parents=True)
        (root / "scripts").mkdir()
        for name in ("quickstart.sh", "venv.sh"):
            shutil.copy(SCRIPTS / name, root / "scripts" / name)
        for name in ("setup.py", "pyproject.toml"):
            (root / name).write_text("# any")
        (self.home / "python").write_text(STAND_IN)
        (self.home / "python").chmod(0o755)
        self.perplexities("32000.0", "150.5")

    def perplexities(self, *values):
        (self.home / "perplexities").write_text("\n".join(values) + "\n")

    def fail(self, kind, fails=True):
        marker = self.home / f"fail_{kind}"
        marker.touch() if fails else marker.unlink()

    def run(self, *arguments, path=None):
        (self.home / "log").unlink(missing_ok=True)
        return subprocess.run(
            [BASH, str(self.root / "scripts/quickstart.sh"), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.root.parent,
            env={**os.environ, "PATH": path} if path else None,
        )

    @property
    def commands(self):
        log = self.home / "log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "a project")


@pytest.fixture
def output(project):
    return project.root / "quickstart_output"


def test_first_run(project, output):
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert project.commands == [
        *("install", "text", "preprocess", "preprocess"),
        *("first_step", "evaluate", "train", "evaluate", "generate"),
    ]
    assert "32000.0 untrained, 150.5 after 100 steps" in done.stdout
    assert str(output / "run/report.html") in done.stdout


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml"])
def test_the_package_is_installed_again_when_what_describes_it_changes(project, name):
    def installs():
        project.perplexities("32000.0", "150.5")
        assert project.run("--fresh").returncode == 0
        return project.commands.count("install")

    assert installs() == 1
    assert installs() == 0
    with (project.root / name).open("a") as described:
        described.write("# and more")
    assert installs() == 1


def test_second_run_does_nothing_and_says_so(project):
    project.run()
    again = project.run()
    assert again.returncode == 0
    assert "already finished" in again.stdout
    assert "150.5 after 100 steps" in again.stdout
    assert project.commands == []


def test_goes_on_after_an_interruption(project):
    project.fail("train")
    assert project.run().returncode == 1
    project.fail("train", False)
    again = project.run()
    assert again.returncode == 0, again.stderr
    assert project.commands == ["train", "evaluate", "generate"]
    assert "32000.0 untrained, 150.5 after" in again.stdout


def test_more_steps_go_on_from_the_checkpoint(project, output):
    project.run()
    project.perplexities("90.0")
    more = project.run("--steps", "240")
    assert more.returncode == 0, more.stderr
    assert project.commands == ["train", "evaluate", "generate"]
    assert "90.0 after 240 steps" in more.stdout
    fewer = project.run("--steps", "60")
    assert fewer.returncode == 2
    assert "240 steps" in fewer.stderr
    assert (output / "summary-100.txt").is_file()


def test_fails_when_nothing_was_learned(project, output):
    project.perplexities("32000.0", "1600.1")
    done = project.run()
    assert done.returncode == 1
    assert "from 32000.0 to 1600.1" in done.stderr
    assert not (output / "summary-100.txt").exists()


def test_fails_when_the_evaluation_fails(project):
    project.fail("evaluate")
    assert project.run().returncode == 1
    assert project.commands[-1] == "evaluate"


def test_fresh_moves_the_earlier_run_aside(project, output):
    project.run()
    first = (output / "summary-100.txt").read_text()
    project.perplexities("32000.0", "70.0")
    done = project.run("--fresh")
    assert done.returncode == 0, done.stderr
    assert project.commands[0] == "text"
    moved = output.with_name("quickstart_output.1")
    assert (moved / "summary-100.txt").read_text() == first
    assert "70.0" in (output / "summary-100.txt").read_text()


def test_refuses_another_text_in_the_same_folder(project, tmp_path):
    project.run()
    other = tmp_path / "other.txt"
    other.write_text("text")
    done = project.run("--text", str(other))
    assert done.returncode == 2
    assert str(other) in done.stderr
    assert project.commands == []


@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_refuses_a_folder_that_is_not_its_own(project, tmp_path, more):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    done = project.run("--output", "mine", *more)
    assert done.returncode == 2
    assert "something else" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--text", "absent.txt"], "absent.txt"),
        (["--steps", "many"], "--steps many"),
        (["--steps", "19"], "--steps 19"),
        (["--steps"], "--steps needs a value"),
        (["--stesp", "50"], "--stesp"),
    ],
)
def test_wrong_options(project, arguments, named):
    done = project.run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert project.commands == []


@pytest.mark.parametrize("version", ["none", "3.9"])
def test_without_a_python_that_serves(project, tmp_path, version):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "cat", "ls"):
        (tools / name).symlink_to(shutil.which(name))
    if version == "3.9":  # a Python that finds itself too old
        (tools / "python3").write_text(f"#!{BASH}\nexit 1\n")
        (tools / "python3").chmod(0o755)
    (project.home / "python").unlink()
    done = project.run(path=str(tools))
    assert done.returncode == 2
    assert "no Python 3.10 or newer" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (project.root / "quickstart_output").exists()


def run_text_script(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(TEXT_SCRIPT), "--output_dir", str(folder), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def documents(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def paragraphs(texts):
    return [" ".join(one.split()) for text in texts for one in text.split("\n\n") if one.strip()]


def test_manual_has_no_paragraph_in_both_parts(tmp_path):
    done = run_text_script(tmp_path)
    assert done.returncode == 0, done.stderr
    train, held_back = (paragraphs(documents(tmp_path, n)) for n in ("train", "held_back"))
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, held_back)) > 10_000
    assert set(train).isdisjoint(held_back)
    assert len(set(train)) == len(train)


def test_own_text_is_split_without_loss(tmp_path):
    written = [f"Paragraph {i}, äöü: " + "words and words " * 50 for i in range(300)]
    (tmp_path / "own.txt").write_text("\n\n".join(written), encoding="utf-8")
    done = run_text_script(tmp_path, "--text", str(tmp_path / "own.txt"))
    assert done.returncode == 0, done.stderr
    train, held_back = (paragraphs(documents(tmp_path, n)) for n in ("train", "held_back"))
    assert sorted(train + held_back) == sorted(one.strip() for one in written)
    assert 5 * len(held_back) < len(train) < 20 * len(held_back)


@pytest.mark.parametrize(
    "content, reason",
    [(b"too short", "9 characters"), (b"\xff\xfe\xff", "not readable as UTF-8")],
)
def test_unusable_text_is_named(tmp_path, content, reason):
    (tmp_path / "own.txt").write_bytes(content)
    done = run_text_script(tmp_path, "--text", str(tmp_path / "own.txt"))
    assert done.returncode == 2
    assert "own.txt" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_real_thing(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPTS / "quickstart.sh"), "--output", str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/run/report.html").is_file()
