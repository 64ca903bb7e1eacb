"""Training graphs for Ascend pass MindSpore's front end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


# A process each: MindSpore keeps what it parsed, and a later graph may pass for that reason alone.
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "layout",
    [
        ["--grid", "data_parallel=2", "expert_parallel=2"],
        ["--grid", "data_parallel=2", "expert_parallel=2", "--capacity_factor=1.1"],
        ["--grid", "context_parallel=2"],
    ],
    ids=["dropless experts", "experts with capacity", "parts of a sequence"],
)
def test_training(layout, rank):
    done = subprocess.run(
        [sys.executable, TESTS / "ascend/front_end.py", f"--rank={rank}", *layout],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["built"], done.stderr[-2000:]
