"""kill -9 at any moment of a run costs nothing but the steps after the last checkpoint."""

import os
import random
import signal
import subprocess
import time

import pytest
from helpers.runs import assert_same_run, command, environment, make_run

from mixtral_ms.train.report.metrics import read_metrics

pytestmark = pytest.mark.slow

START_SECONDS = 120  # until the first step, graph compilation included
FINISH_SECONDS = 400
STEPS_BEFORE = 6
STEP_WINDOW_SECONDS = 0.3  # some steps with their checkpoints
START_WINDOW_SECONDS = 8.0


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("killed"))


class Leg:
    """One process of a run, in a session of its own; its log in a file."""

    def __init__(self, log, arguments):
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command(*arguments),
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_steps(self, count):
        """Return when it has done some steps, or has ended."""
        end = time.monotonic() + START_SECONDS
        while self.log.read_bytes().count(b"  loss ") < count and self.process.poll() is None:
            assert time.monotonic() < end, f"too few steps in time:\n{self.log.read_text()}"
            time.sleep(0.005)

    def kill(self):
        """Kill the session; whether it was still running."""
        running = self.process.poll() is None
        if running:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        return running

    def finish(self):
        try:
            status = self.process.wait(FINISH_SECONDS)
        finally:
            self.kill()
        assert status == 0, self.log.read_text()


def arguments(path, output, steps, *more):
    return [
        *("--config", path, "--output_dir", output, "--resume_training", "True"),
        *("--set", f"runner_config.max_steps={steps}"),
        *more,
    ]


def async_save(leg):
    """Half of the legs save in the background."""
    return ("--set", f"callbacks.0.async_save={leg % 2 == 0}")


def kill_often(folder, path, kills, steps, seed, *more):
    """Start, kill and resume a run until it has been killed `kills` times; then let it end.

    Returns:
        For each kill the last step in the metrics, and whether a checkpoint was being written.
    """
    chance = random.Random(seed)
    output, log = folder / "killed", folder / "leg.log"
    every = ("--set", "callbacks.0.save_checkpoint_steps=1")
    found = []
    for number in range(kills):
        leg = Leg(log, arguments(path, output, steps, *more, *every, *async_save(number)))
        try:
            if chance.random() < 0.85:
                leg.wait_for_steps(chance.randint(1, STEPS_BEFORE))
                time.sleep(chance.uniform(0, STEP_WINDOW_SECONDS))
            else:  # while it starts, reads its checkpoint and compiles
                time.sleep(chance.uniform(0, START_WINDOW_SECONDS))
        finally:
            killed = leg.kill()
        assert killed, f"the run was over after {number} kills:\n{log.read_text()}"
        writing = any((output / "checkpoint").glob(".*.new-*"))
        metrics = output / "metrics.jsonl"
        lines = read_metrics(metrics) if metrics.exists() else []
        found.append((lines[-1]["step"] if lines else 0, writing))
    Leg(log, arguments(path, output, steps, *more, *every)).finish()
    return found


def run_whole(folder, path, steps, *more):
    leg = Leg(folder / "whole.log", arguments(path, folder / "whole", steps, *more))
    leg.finish()


def report(found):
    steps = ", ".join(f"{step}{' (writing)' if writing else ''}" for step, writing in found)
    print(f"{len(found)} kills after the steps {steps}")


@pytest.mark.timeout(600)
def test_a_run_killed_three_times_is_the_run_that_was_not(yaml_path, tmp_path):
    no_eval = ("--do_eval", "False")
    run_whole(tmp_path, yaml_path, 100, *no_eval)
    found = kill_often(tmp_path, yaml_path, 3, 100, 7, *no_eval)
    report(found)
    assert any(step > 0 for step, _ in found)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_twenty_kills(yaml_path, tmp_path):
    run_whole(tmp_path, yaml_path, 600)
    found = kill_often(tmp_path, yaml_path, 20, 600, 11)
    report(found)
    assert len({step for step, _ in found}) >= 10
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
