"""kill -9 of any rank at any moment ends all of them, and costs the steps after the checkpoint."""

import os
import random
import signal
import time

import pytest
from helpers.jobs import Job, assert_close_records, layout_flags, run_layout, run_order
from helpers.runs import assert_same_run, make_run, metrics_of, run_command

KILLS, RANKS, STEPS = 10, 2, 400
LAYOUT = "dp=2"
STEPS_BEFORE, STEP_WINDOW_SECONDS, START_WINDOW_SECONDS = 30, 0.5, 12.0
END_SECONDS = 40
KEYS = (f"--runner_config.max_steps={STEPS}", "--do_eval=False")


def kill_one(job, chance):
    """Kill a random rank, mostly while it trains, or else while it starts; returns which."""
    rank = chance.randrange(RANKS)
    if chance.random() < 0.8:
        job.wait_for_steps(chance.randint(1, STEPS_BEFORE))
        time.sleep(chance.uniform(0, STEP_WINDOW_SECONDS))
    else:
        time.sleep(1.0 + chance.uniform(0, START_WINDOW_SECONDS))
    os.kill(job.pid_of(rank), signal.SIGKILL)
    return rank


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_kills_of_any_rank(tmp_path, report_error):
    yaml, output, chance = make_run(tmp_path), tmp_path / "killed", random.Random(5)
    saves = ("--callbacks.0.save_checkpoint_steps=2", "--resume_training=True")
    for number in range(KILLS):
        more = (*KEYS, *saves, f"--callbacks.0.async_save={number % 2 == 0}")
        order = run_order(yaml, output, *layout_flags(LAYOUT), *more)
        with Job(tmp_path, order, RANKS) as job:
            rank = kill_one(job, chance)
            begin = time.monotonic()
            assert job.finish(END_SECONDS) == 128 + signal.SIGKILL, job.text
            print(f"kill {number}: rank {rank}, all ended after {time.monotonic() - begin:.1f} s")
            assert f"failed: rank {rank} was ended by SIGKILL" in job.text
            assert not job.alive()
    run_layout(tmp_path, yaml, output, LAYOUT, *KEYS, *saves)
    run_layout(tmp_path, yaml, tmp_path / "whole", LAYOUT, *KEYS)
    assert_same_run(output, tmp_path / "whole")
    alone = ("--config", yaml, "--output_dir", tmp_path / "alone", *KEYS)
    done = run_command(*alone, "--runner_config.stop_at_step=8")
    assert done.returncode == 0, done.stderr
    expected = metrics_of(tmp_path / "alone")
    report_error("metrics", assert_close_records(metrics_of(output)[:8], expected), 1e-5)
