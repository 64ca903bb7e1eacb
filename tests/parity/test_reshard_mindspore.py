"""Each step of 1 -> 8 -> 4 -> 1 ranks against mindspore.transform_checkpoints, bit for bit."""

import json
import subprocess
import sys

import pytest
from helpers.runs import environment
from helpers.sharded import contents, write_whole

from mixtral_ms.checkpoint.formats.strategy_file import read_strategies, write_merged_strategy
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform

pytestmark = pytest.mark.slow

EIGHT, FOUR = "dp=2,mp=2,ep=2,pp=2,zero=1", "mp=4,ep=4"
STEPS = (("whole", "eight"), ("eight", "four"), ("four", "merged"))
CASES = [(f, d) for f in ("ckpt", "safetensors") for d in ("float32", "bfloat16")]

# Prints, for each step, names and values in which MindSpore's output is not ours.
MINDSPORE = """
import glob, json, sys
import numpy as np
import mindspore as ms

def same(a, b):
    a, b = (one.float().asnumpy() if one.dtype == ms.bfloat16 else one.asnumpy() for one in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

differences, compared = [], 0
for job in json.loads(sys.argv[1]):
    before, after = job["strategies"]
    ms.transform_checkpoints(
        *job["folders"], "checkpoint_", before, after, output_format=job["format"]
    )
    for rank in range(job["ranks"]):
        file = f"rank_{rank}/checkpoint_{rank}.{job['format']}"
        ours, theirs = (
            ms.load_checkpoint(f"{folder}/{file}", format=job["format"])
            for folder in (job["ours"], job["folders"][1])
        )
        for tensors in (ours, theirs):  # MindSpore keeps what no strategy names only in some cases
            tensors.pop("global_step", None)
        differences += [f"{file}: {name}" for name in set(ours) ^ set(theirs)]
        for name in set(ours) & set(theirs):
            compared += 1
            if ours[name].dtype != theirs[name].dtype or not same(ours[name], theirs[name]):
                differences.append(f"{file}: {name}")
print(json.dumps([differences, compared]))
"""


def chain(folder, format_, dtype):
    """Our three steps; returns what MindSpore is to do."""
    write_whole(folder / f"whole/rank_0/checkpoint_0.{format_}", dtype)
    for (source, target), grid in zip(STEPS, (EIGHT, FOUR, None), strict=True):
        transform(TransformOptions(folder / source, folder / target, dst_strategy=grid))
        if grid:
            placements = read_strategies(folder / target / "strategy")
            write_merged_strategy(folder / f"{target}_strategy.ckpt", placements)
    strategies = {name: str(folder / f"{name}_strategy.ckpt") for name in ("eight", "four")}
    return [
        {
            "folders": [str(folder / source), str(folder / f"{target}_by_mindspore")],
            "strategies": [strategies.get(source), strategies.get(target)],
            "ours": str(folder / target),
            "ranks": len(list((folder / target).glob("rank_*"))),
            "format": format_,
        }
        for source, target in STEPS
    ]


@pytest.mark.parametrize("format_, dtype", CASES)
def test_round_trip_changes_no_bit(tmp_path, format_, dtype):
    chain(tmp_path, format_, dtype)
    before = contents(tmp_path / f"whole/rank_0/checkpoint_0.{format_}")
    assert contents(tmp_path / f"merged/rank_0/checkpoint_0.{format_}") == before
    assert len(before) == 70


def test_every_step_is_mindspore_s(tmp_path):
    jobs = [job for f, d in CASES for job in chain(tmp_path / f"{f}_{d}", f, d)]
    done = subprocess.run(
        [sys.executable, "-c", MINDSPORE, json.dumps(jobs)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differences, compared = json.loads(done.stdout.splitlines()[-1])
    assert differences == []
    assert compared > len(CASES) * 3 * 69
