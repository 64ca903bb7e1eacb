"""Training by the launcher on two data-parallel ranks, against the same run on one process."""

import os
import shutil
import signal

import pytest
from helpers.jobs import Job, assert_close_records, layout_flags, run_layout, run_order
from helpers.runs import ROOT, assert_same_run, make_run, metrics_of, run_command

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint

pytestmark = pytest.mark.timeout(400)
STEPS = 8
SAVES = ("--set", "callbacks.0.keep_checkpoint_max=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run on one process, with two micro batches a step."""
    done = run_command("--config", folder / "run.yaml", "--output_dir", folder / "alone", *SAVES)
    assert done.returncode == 0, done.stderr
    return folder / "alone"


@pytest.fixture(scope="module")
def together(folder):
    """The same on two ranks with one micro batch each; returns the output and the terminal."""
    text = run_layout(folder, folder / "run.yaml", folder / "together", "dp=2", *SAVES)
    return folder / "together", text


def start_at(run, step, output):
    """A new output folder with a run's checkpoint of a step and the metrics up to it."""
    name = f"mixtral-step_{step:07d}"
    shutil.copytree(run / "checkpoint" / name, output / "checkpoint" / name)
    shutil.copyfile(run / "metrics.jsonl", output / "metrics.jsonl")
    return output


def test_numbers_are_those_of_one_process(together, alone, report_error):
    worst = assert_close_records(metrics_of(together[0]), metrics_of(alone))
    report_error("metrics", worst, 1e-5)


def test_one_rank_speaks_for_all(together):
    output, text = together
    for said in (f"step {STEPS}/{STEPS}  loss ", f"eval at step {STEPS}: loss ", "54,496 param"):
        assert text.count(said) == 1
    assert "WARNING" not in text and "Traceback" not in text
    log = (output.parent / "logs/worker_1.log").read_text()
    assert all(line.startswith("[INFO] DISTRIBUTED") for line in log.splitlines())
    held = {path.name for path in output.iterdir()}
    assert held == {"checkpoint", "config.yaml", "metrics.jsonl", "strategy"}
    assert len(list((output / "strategy").iterdir())) == 2


def test_every_rank_is_in_every_checkpoint(together):
    found = list_checkpoints(together[0] / "checkpoint")
    assert [path.name[-1] for path in found] == ["2", "4", "6", "8"]
    for path in found:
        assert verify_checkpoint(path) == []
        assert {f"rank_{rank}" for rank in (0, 1)} < {one.name for one in path.iterdir()}


def test_a_resume_is_the_run_bit_for_bit(together, folder):
    output = start_at(together[0], 4, folder / "resumed")
    run_layout(folder, folder / "run.yaml", output, "dp=2", *SAVES, "--resume_training", "True")
    assert_same_run(output, together[0])


def test_one_process_takes_up_what_two_ranks_saved(together, alone, folder):
    output = start_at(together[0], 4, folder / "merged")
    order = run_order(folder / "run.yaml", output, *SAVES, "--resume_training", "True")
    done = run_command(*order[1:])
    assert done.returncode == 0, done.stderr
    assert "shared otherwise: data_parallel was 2 and is 1" in done.stderr
    assert_close_records(metrics_of(output), metrics_of(alone))


def test_sigterm_to_one_rank_saves_and_ends_all(alone, folder):
    """What one process saved goes on on two ranks, until a signal reaches one of them."""
    output = start_at(alone, 2, folder / "terminated")
    order = run_order(folder / "run.yaml", output, *layout_flags("dp=2"))
    more = ("--resume_training", "True", "--epochs", "1000", "--do_eval", "False")
    with Job(folder, [*order, *more, "--set", "lr_schedule.total_steps=8"], 2) as job:
        job.wait_for_steps(2)
        os.kill(job.pid_of(1), signal.SIGTERM)
        assert job.finish(60) == 128 + signal.SIGTERM
        assert not job.alive()
    last = metrics_of(output)[-1]["step"]
    assert f"stopped by SIGTERM after step {last}; to go on: " in job.text
    saved = list_checkpoints(output / "checkpoint")[-1]
    assert saved.name == f"mixtral-step_{last:07d}" and verify_checkpoint(saved) == []
    steps = [one for one in metrics_of(output) if 2 < one["step"] <= STEPS]
    expected = [one for one in metrics_of(alone) if one["kind"] == "train"]
    assert_close_records(steps, [one for one in expected if 2 < one["step"] <= steps[-1]["step"]])


def test_a_rank_with_another_configuration_is_named(folder):
    script = folder / "differing.py"
    script.write_text(
        "import os, sys\n"
        "from mixtral_ms.cli.commands.run import command\n"
        "sys.argv += ['--seed', str(5 + int(os.environ['RANK_ID']))]\n"
        "sys.exit(command())\n"
    )
    order = run_order(folder / "run.yaml", folder / "differing", *layout_flags("dp=2"))
    with Job(folder, [script, *order[1:]], 2) as job:
        assert job.finish(60) == 2
    said = "rank 1 was started with something else than rank 0:\n  seed: 6 on rank 1, 5 on rank 0"
    assert job.text.count(said) == 1
    assert not (folder / "differing").exists()


def test_a_grid_that_does_not_fit_is_refused_once(folder):
    order = run_order(folder / "run.yaml", folder / "unfit", *layout_flags("dp=4", 4))
    with Job(folder, [ROOT / "run_mindformer.py", *order[1:]], 2) as job:
        assert job.finish(60) == 2
    assert job.text.count("= 4 ranks, but 2 processes were started") == 1
