"""Training graphs for Ascend pass MindSpore's front end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


# A process each: MindSpore keeps what it parsed, and a later graph may pass for that reason alone.
@pytest.mark.parametrize("rank", [0, 1])
def test_experts_of_two_ranks(rank):
    done = subprocess.run(
        [sys.executable, TESTS / "ascend/front_end.py", f"--rank={rank}"]
        + ["--grid", "data_parallel=2", "expert_parallel=2"],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["built"], done.stderr[-2000:]
