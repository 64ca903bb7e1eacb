"""What comes between two steps and goes wrong: what is saved, what is raised, what a resume does.

The steps themselves are played; that real ones end so is in tests/faults.
"""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.played import EVALUATION, played_run
from helpers.runs import make_run, metrics_of

from mixtral_ms.checkpoint.store.store import CheckpointError, load_checkpoint
from mixtral_ms.config import load_config
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.state import rank_agreement as agreement
from mixtral_ms.train.state.rank_agreement import StepSync, Storage
from mixtral_ms.train.stop_signals import STOP_SIGNALS
from mixtral_ms.train.train_mode import train
from mixtral_ms.train.training_run import NotFiniteError, TrainingRun

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    folder = tmp_path_factory.mktemp("between")
    make_run(folder)
    return folder


@pytest.fixture
def new_run(folder, tmp_path):
    """Makes a run that evaluates after each of its epochs of 2 steps; its steps cost nothing."""

    def make(*overrides, at_step=lambda step: None, at_update=lambda step: None):
        defaults = ("callbacks.0.save_checkpoint_steps=100", "eval_step_interval=-1")
        given = [f"output_dir={tmp_path / 'out'}", *defaults, *overrides]
        return played_run(load_config(folder / "run.yaml", given), at_step, at_update)

    return make


def saved(tmp_path):
    """Steps of the checkpoints."""
    return sorted(int(p.name[-7:]) for p in (tmp_path / "out" / "checkpoint").glob("mixtral-*"))


def failing(error, first=3):
    """Fails from a step on."""

    def at(step):
        if step >= first:
            raise error

    return at


def fail_data(run, error):
    batches = run.loader.batches

    def until(epoch, start=0):
        for number, batch in enumerate(batches(epoch, start)):
            if epoch == 1 and number == 1:  # the second micro batch of step 3
                raise error
            yield batch

    run.loader.batches = until


def fail_evaluation(run, error):
    def evaluate():
        raise error

    run.evaluator = evaluate


def fail_metrics(run, error):
    def write(record):
        if record["step"] >= 3:
            raise error

    run._metrics_writer = lambda step: SimpleNamespace(write=write, close=lambda: None)


FAULTS = [
    # what fails, with what, and which steps are saved then
    ("data", UserError("record 13 has the id 200"), [2]),
    ("data", OSError(5, "Input/output error"), [2]),
    ("evaluation", UserError("no supervised token"), [2]),
    ("evaluation", RuntimeError("out of memory"), [2]),
    ("evaluation", MemoryError(), [2]),
    ("metrics", OSError(28, "No space left on device"), [3]),
    ("step", UserError("a micro batch holds 9 packed samples"), [2]),
    ("step", RuntimeError("out of memory"), [2]),
    ("update", RuntimeError("halfway"), []),  # weights of two steps
    ("step", NotFiniteError("3 steps in a row"), []),  # what is saved is better
    ("step", KeyboardInterrupt(), []),  # "leaves at once"
    ("evaluation", KeyboardInterrupt(), []),
    ("evaluation", CheckpointError("disk full"), []),
]


@pytest.mark.parametrize(("what", "error", "steps"), FAULTS)
def test_an_error_leaves_the_steps_that_are_whole(new_run, tmp_path, capsys, what, error, steps):
    run = new_run(
        at_step=failing(error) if what == "step" else lambda step: None,
        at_update=failing(error) if what == "update" else lambda step: None,
    )
    wrong = {"data": fail_data, "evaluation": fail_evaluation, "metrics": fail_metrics}
    wrong.get(what, lambda run, error: None)(run, error)
    with pytest.raises(type(error)) as caught:
        run.run()
    assert caught.value is error
    assert saved(tmp_path) == steps
    said = capsys.readouterr().err
    for step in steps:
        assert f"step {step} is saved: when it is mended, the same command with" in said
    assert said.count("an error ends the run") == len(steps)


def test_an_error_before_the_first_step_saves_nothing(new_run, tmp_path):
    with pytest.raises(UserError):
        new_run(at_step=failing(UserError("x"), first=1)).run()
    assert saved(tmp_path) == []


def test_an_error_saves_nothing_again_that_a_resume_began_with(new_run, tmp_path):
    new_run("runner_config.stop_at_step=3").run()
    before = (tmp_path / "out/checkpoint/mixtral-step_0000003/manifest.json").stat().st_mtime_ns
    with pytest.raises(UserError):
        new_run("resume_training=True", at_step=failing(UserError("x"))).run()
    assert saved(tmp_path) == [3]
    after = (tmp_path / "out/checkpoint/mixtral-step_0000003/manifest.json").stat().st_mtime_ns
    assert before == after


@pytest.mark.parametrize("clock", [False, True])
def test_a_checkpoint_that_is_due_is_there_before_the_evaluation(new_run, tmp_path, clock):
    run = new_run(*([] if clock else ["callbacks.0.save_checkpoint_steps=2"]))
    if clock:
        run.saver.time_is_up = lambda: run.done % 2 == 0
    seen = []
    run.evaluator = lambda: seen.append(saved(tmp_path)[-1]) or EVALUATION
    run.run()
    assert seen == [2, 4, 6, 8]


def test_a_disk_that_is_full_is_met_once(new_run, monkeypatch):
    run, tries = new_run("callbacks.0.save_checkpoint_steps=2"), []

    def save(step):
        tries.append(step)
        raise CheckpointError("cannot save")

    monkeypatch.setattr(run.saver, "save", save)
    with pytest.raises(CheckpointError):
        run.run()
    assert tries == [2]


def test_an_error_that_cannot_be_saved_after_is_the_one_raised(new_run, monkeypatch, capsys):
    run = new_run(at_step=failing(UserError("the first")))

    def save(step):
        raise CheckpointError("disk full")

    monkeypatch.setattr(run.saver, "save", save)
    with pytest.raises(UserError, match="the first"):
        run.run()
    assert "step 2 cannot be saved: disk full" in capsys.readouterr().err


@pytest.fixture(params=STOP_SIGNALS, ids=lambda number: number.name)
def number(request):
    """A signal that nohup, or whatever started the tests, does not keep away."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_every_signal_that_ends_processes_saves_and_leaves_the_evaluation_to_a_resume(
    new_run, tmp_path, number
):
    def at_step(step):
        if step == 4:
            os.kill(os.getpid(), number)

    result = new_run(at_step=at_step).run()
    assert (result.step, result.signal_number) == (4, number)
    assert saved(tmp_path) == [4]
    kinds = [(record["kind"], record["step"]) for record in metrics_of(tmp_path / "out")]
    assert kinds[-2:] == [("train", 3), ("train", 4)]
    new_run("resume_training=True").run()
    kinds = [(record["kind"], record["step"]) for record in metrics_of(tmp_path / "out")]
    expected = [("train", step) for step in range(1, STEPS + 1)]
    expected += [("eval", step) for step in (2, 4, 6, 8)]
    assert sorted(kinds) == sorted(expected)
    assert kinds.index(("eval", 4)) == kinds.index(("train", 4)) + 1


def test_a_signal_during_an_evaluation_ends_the_run_behind_it(new_run, tmp_path):
    run, number = new_run(), signal.SIGTERM

    def evaluate():
        os.kill(os.getpid(), number)
        return EVALUATION

    run.evaluator = evaluate
    result = run.run()
    assert (result.step, result.signal_number) == (2, number)
    assert saved(tmp_path) == [2]


def test_of_several_ranks_the_error_of_one_is_everybodys(monkeypatch):
    def summed(world, values):
        return np.asarray(values) + np.array([0, 1, *[0] * len(STOP_SIGNALS)])

    monkeypatch.setattr(agreement, "sum_values", summed)
    monkeypatch.setattr(agreement, "gather_objects", lambda world, own: [own, "record 3 is bad"])
    sync = StepSync(Mesh())
    assert sync(None, False) == (None, False, True)
    with pytest.raises(UserError, match="rank 1: record 3 is bad"):
        sync.raise_error(None)


def test_evaluation_data_without_a_target_is_refused_before_the_first_step(folder, tmp_path):
    ids = np.full((4, 33), 5, np.int32)
    with RecordWriter(tmp_path / "none.mindrecord", ("input_ids", "labels")) as writer:
        writer.write(input_ids=ids, labels=np.full_like(ids, -100))
    given = [
        f"output_dir={tmp_path / 'out'}",
        f"eval_dataset.data_loader.dataset_dir={tmp_path / 'none.mindrecord'}",
        "eval_dataset.input_columns=[input_ids, labels]",
    ]
    config = load_config(folder / "run.yaml", given)
    with pytest.raises(UserError, match="eval_dataset holds no supervised token"):
        TrainingRun(config, Mesh(), Storage(), None)


@pytest.mark.parametrize("shared", ["output_dir", "directory", "path"])
def test_a_second_run_on_the_same_place_is_refused(folder, tmp_path, monkeypatch, shared):
    """While one is under way, a new one and a resume; afterwards the place is free."""
    elsewhere = {
        "output_dir": [],
        "directory": [f"callbacks.0.directory={tmp_path / 'saved'}"],
        "path": [f"callbacks.1={{type: MetricsWriter, path: {tmp_path / 'm.jsonl'}}}"],
    }[shared]

    def config(name, *more):
        return load_config(
            folder / "run.yaml", [f"output_dir={tmp_path / name}", *elsewhere, *more]
        )

    other = "first" if shared == "output_dir" else "second"

    class Second(TrainingRun):
        def run(self):
            for resume in (True, False):
                with pytest.raises(UserError, match=rf"{shared} .*another run.*process \d+"):
                    train(config(other, f"resume_training={resume}"), Mesh(), None)
            return "done"

    monkeypatch.setattr("mixtral_ms.train.train_mode.TrainingRun", Second)
    assert train(config("first"), Mesh(), CausalLMObjective) == "done"
    assert not list(tmp_path.rglob(".*lock")) and not (tmp_path / "second").exists()


def test_what_is_saved_on_an_error_is_the_state_behind_its_step(new_run, tmp_path):
    with pytest.raises(UserError):
        new_run(at_step=failing(UserError("x"), first=6)).run()
    found = load_checkpoint(tmp_path / "out" / "checkpoint" / "mixtral-step_0000005")
    assert (found.state["step"], found.state["optimizer_updates"]) == (5, 5)
