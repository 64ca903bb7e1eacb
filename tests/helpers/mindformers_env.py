"""The environment with MindFormers: tests/integrations/mindformers_side.py runs in it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "MINDFORMERS_PYTHON"
USUAL = ROOT / ".venv-mindformers/bin/python"


def mindformers_python():
    """The interpreter of the environment with MindFormers; skips where there is none.

    scripts/test.sh makes the environment and sets the variable, and then it has to be there.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        pytest.fail(f"{VARIABLE} names {named}, which is no file")
    if not named and not USUAL.is_file():
        pytest.skip(
            f"no {USUAL}: scripts/test.sh makes it, or python3.11 -m venv .venv-mindformers && "
            '.venv-mindformers/bin/pip install -e ".[mindformers]" mindspore==2.7.2'
        )
    return named or str(USUAL)


def in_mindformers(scenario, folder, timeout=250):
    """Run a scenario of integrations/mindformers_side.py in `folder`; returns what it found."""
    script = ROOT / "tests/integrations/mindformers_side.py"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [mindformers_python(), script, scenario, folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "GLOG_v": "3"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((folder / f"{scenario}.json").read_text(encoding="utf-8"))


def tensors(path):
    """Tensors by name of an .npz file."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored}
