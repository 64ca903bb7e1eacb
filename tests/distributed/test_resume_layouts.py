"""A run that is stopped on one layout and taken up on another is the run that was not stopped."""

import shutil

import pytest
from helpers.jobs import assert_close_records, run_layout
from helpers.runs import make_run, metrics_of

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
STEPS, STOP = 6, 3
MICRO_BATCHES = 4
KEYS = (
    "--model.model_config.num_layers=2",
    "--batch_size=2",
    f"--runner_config.max_steps={STEPS}",
    "--do_eval=False",
)
PAIRS = [
    ("dp=2", "dp=1"),
    ("dp=1", "mp=2"),
    ("mp=2", "dp=2,ep=2"),
    ("dp=2,ep=2", "dp=2,zero=1"),
    ("dp=2,zero=1", "dp=2,mp=2"),
    ("dp=2,mp=2", "pp=2"),
    ("pp=2", "mp=2,pp=2"),
    ("mp=2,pp=2", "dp=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def train(folder):
    """Runs a layout from an output folder on."""

    def run(output, layout, *more):
        place = (folder, folder / "run.yaml", output, layout)
        run_layout(*place, *KEYS, *more, micro_batches=MICRO_BATCHES)
        return output

    return run


@pytest.fixture(scope="module")
def whole(train, folder):
    """The metrics of the run on one process that was never stopped."""
    return metrics_of(train(folder / "whole", "dp=1"))


@pytest.fixture(scope="module")
def stopped(train, folder):
    """Output of a run on a layout that was stopped; each is made once."""
    made = {}

    def stop(layout):
        if layout not in made:
            output = folder / f"stopped_{len(made)}"
            made[layout] = train(output, layout, f"--runner_config.stop_at_step={STOP}")
        return made[layout]

    return stop


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_steps_after_are_those_of_the_uninterrupted_run(
    first, second, stopped, train, whole, tmp_path, report_error
):
    output = tmp_path / "output"
    shutil.copytree(stopped(first), output)
    assert verify_checkpoint(list_checkpoints(output / "checkpoint")[-1]) == []
    train(output, second, "--resume_training=True")
    report_error(f"{first} -> {second}", assert_close_records(metrics_of(output), whole), 1e-5)
