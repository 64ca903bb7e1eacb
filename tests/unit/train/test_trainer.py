"""The Trainer: what a run leaves, and runs that stop and go on."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import (
    EVAL_ROWS,
    EXPERTS,
    SEQ_LENGTH,
    assert_same_run,
    final_tensors,
    make_run,
    metrics_of,
)

from mixtral_ms import Trainer, load_config
from mixtral_ms.checkpoint.store.store import load_checkpoint, save_checkpoint
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_network
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.report.metrics import read_metrics
from mixtral_ms.train.state.rank_agreement import Storage
from mixtral_ms.train.state.resume import find_resume

pytestmark = pytest.mark.usefixtures("graph")
STEPS = 8
NO_EVAL = ("do_eval=False", "callbacks.0.save_checkpoint_steps=100")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    make_run(folder)
    return folder


def config_of(folder, name, *overrides):
    """The tiny run's configuration with an output folder of its own."""
    return load_config(folder / "run.yaml", [f"output_dir={folder / name}", *overrides])


def train(folder, name, *overrides):
    return Trainer(config_of(folder, name, *overrides)).train()


@pytest.fixture(scope="module")
def whole(tiny_run):
    """The output folder of a run in one go."""
    return tiny_run / "output"


@pytest.fixture
def finished(whole, folder, tmp_path):
    """A copy of the finished run that a test may spoil: (configuration of a resume, output)."""
    shutil.copytree(whole, tmp_path / "copy")
    return lambda *more: config_of(
        folder, tmp_path / "copy", "resume_training=True", *more
    ), tmp_path / "copy"


def records(output, kind):
    return [record for record in metrics_of(output) if record["kind"] == kind]


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoint").glob("mixtral-step_*"))


def test_every_step_is_one_line_and_evaluations_lie_between(whole):
    assert [record["step"] for record in records(whole, "train")] == list(range(1, STEPS + 1))
    # every 3 steps, and after each epoch of 2 steps; step 6 is due twice and done once
    assert [record["step"] for record in records(whole, "eval")] == [2, 3, 4, 6, 8]
    steps = [record["step"] for record in metrics_of(whole)]
    assert steps == sorted(steps)


def test_fields_of_a_step(whole):
    for record in records(whole, "train"):
        parts = record["lm_loss"] + record["aux_loss"] + record["z_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-12)
        assert record["aux_loss"] > 0 and record["z_loss"] > 0
        assert record["tokens"] == 2 * 4 * SEQ_LENGTH
        assert record["grad_norm"] > 0 and record["skipped"] is False
        assert record["loss_scale"] == 1
    rates = [record["learning_rate"] for record in records(whole, "train")]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01], rel=1e-12)
    assert all(record["tokens"] == EVAL_ROWS * SEQ_LENGTH for record in records(whole, "eval"))


class HalfObjective(CausalLMObjective):
    """Half of the cross entropy."""

    part_names = ("half_loss",)

    def end_parts(self, hidden_BSD, labels_BS):
        return (0.5 * super().end_parts(hidden_BSD, labels_BS)[0],)


def test_a_trainer_takes_an_objective(whole, folder):
    """Its name stands in metrics.jsonl, and evaluation is of it too."""
    config = config_of(folder, "objective", "runner_config.stop_at_step=2")
    Trainer(config, objective=HalfObjective).train()
    (first, *_), (usual, *_) = records(folder / "objective", "train"), records(whole, "train")
    assert "lm_loss" not in first
    assert first["half_loss"] == pytest.approx(usual["lm_loss"] / 2, rel=1e-6)
    assert first["loss"] == pytest.approx(first["half_loss"] + first["aux_loss"] + first["z_loss"])
    # the first step's rate is 0, and Adam's is no other for half the gradient
    evaluations = [records(out, "eval")[0]["loss"] for out in (folder / "objective", whole)]
    assert evaluations[0] == pytest.approx(evaluations[1] / 2, rel=1e-2)


def test_timing_fields_are_there(whole):
    record = read_metrics(whole / "metrics.jsonl")[-3]
    assert record["kind"] == "train"
    assert record["tokens_per_second"] == pytest.approx(
        1000 * record["tokens"] / record["step_time_ms"], rel=1e-9
    )
    assert record["mfu"] == pytest.approx(
        record["achieved_flops_per_second"] / record["peak_flops_per_second"], rel=1e-9
    )


def test_the_loss_falls(whole):
    losses = [record["loss"] for record in records(whole, "eval")]
    assert losses[0] < math.log(512) + 0.2
    assert losses[-1] < losses[0] - 0.3


def test_the_newest_checkpoints_are_kept_and_numbered_by_step(whole):
    assert checkpoints(whole) == ["mixtral-step_0000006", "mixtral-step_0000008"]
    assert (whole / "checkpoint" / "latest").read_text().strip() == "mixtral-step_0000008"


def test_the_run_is_described_by_the_yaml_it_leaves(whole, folder):
    again, given = load_config(whole / "config.yaml"), config_of(folder, "whole")
    assert again.runner_config == given.runner_config
    assert again.model == given.model
    assert again.callbacks == given.callbacks


@pytest.mark.slow
def test_a_stopped_run_goes_on_in_the_same_bits(folder, whole):
    output = folder / "stopped"
    # as after a kill before the first checkpoint: lines, the last one torn, that are not this run's
    output.mkdir()
    lines = [json.dumps({"kind": "train", "step": step, "loss": 0.5}) for step in (1, 2)]
    (output / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    first = train(
        folder,
        "stopped",
        "resume_training=True",
        "runner_config.stop_at_step=3",
        "callbacks.0.async_save=True",
    )
    assert first.step == 3
    assert checkpoints(output) == ["mixtral-step_0000002", "mixtral-step_0000003"]
    assert metrics_of(output) == [r for r in metrics_of(whole) if r["step"] <= 3]
    second = train(folder, "stopped", "resume_training=True")
    assert second.step == STEPS
    assert second.evaluation.loss == records(whole, "eval")[-1]["loss"]
    assert checkpoints(output) == checkpoints(whole)
    assert_same_run(output, whole)


def test_resuming_a_finished_run_changes_nothing_and_writes_its_report(finished, whole):
    resume, output = finished
    result = Trainer(resume("callbacks.1.enabled=True")).train()
    assert result.step == STEPS
    assert_same_run(output, whole)
    assert result.report == output / "report.html"
    assert result.report.stat().st_size > 1000


def test_metrics_and_report_with_a_metrics_file_elsewhere(finished):
    resume, output = finished
    shutil.move(output / "metrics.jsonl", output / "numbers.jsonl")
    elsewhere = f"callbacks=[{{type: MetricsWriter, path: {output / 'numbers.jsonl'}}}]"
    result = Trainer(resume(elsewhere)).train()
    assert result.report.exists()
    assert not (output / "metrics.jsonl").exists()
    shutil.rmtree(output / "checkpoint")
    with pytest.raises(UserError, match="already holds a run .*numbers.jsonl"):
        Trainer(resume(elsewhere, "resume_training=False")).train()


def test_a_new_run_does_not_mix_with_an_old_one(finished):
    resume, output = finished
    with pytest.raises(UserError, match=r"already holds a run .*--resume_training True"):
        Trainer(resume("resume_training=False")).train()
    (output / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="already holds a run .*checkpoint"):
        Trainer(resume("resume_training=False")).train()


def test_a_run_that_began_with_weights_resumes_from_its_own_checkpoints(finished, whole, tmp_path):
    resume, output = finished
    weights = tmp_path / "weights"
    shutil.copytree(whole / "checkpoint" / "mixtral-step_0000006", weights / "base")
    found = find_resume(resume(f"load_checkpoint={weights / 'base'}"), Mesh(), Storage())
    assert found.folder == output / "checkpoint" / "mixtral-step_0000008"


@pytest.mark.parametrize("form", ["name", "path"])
def test_an_older_checkpoint_can_be_named(finished, form):
    resume, output = finished
    name = "mixtral-step_0000006"
    chosen = {
        "name": f"resume_training={name}",
        "path": f"load_checkpoint={output / 'checkpoint' / name}",
    }[form]
    assert find_resume(resume(chosen), Mesh(), Storage()).folder.name == name


def test_another_runs_checkpoint_can_be_continued_in_a_new_folder(whole, folder):
    config = config_of(
        folder, "new", "resume_training=True", f"load_checkpoint={whole / 'checkpoint'}"
    )
    assert (
        find_resume(config, Mesh(), Storage()).folder
        == whole / "checkpoint" / "mixtral-step_0000008"
    )


def test_weights_of_a_checkpoint_start_a_new_run(whole, folder):
    network = build_network(
        config_of(folder, "new", f"load_checkpoint={whole / 'checkpoint'}"), Mesh()
    )
    saved = final_tensors(whole)
    for parameter in network.trainable_params():
        assert np.array_equal(parameter.asnumpy(), saved[parameter.name])


def test_a_checkpoint_without_moments_is_not_resumed(whole, folder, tmp_path):
    full = load_checkpoint(whole / "checkpoint" / "mixtral-step_0000008")
    save_checkpoint(tmp_path / "w", "weights", {"model": full.tensors["model"]}, {"step": 8})
    config = config_of(
        folder, "new", "resume_training=True", f"load_checkpoint={tmp_path / 'w' / 'weights'}"
    )
    with pytest.raises(UserError, match="without optimizer state.*--resume_training False"):
        Trainer(config).train()


@pytest.mark.slow
def test_recompute_gives_the_same_losses(folder, whole):
    train(folder, "recompute", *NO_EVAL, "recompute_config.recompute=True")
    got, wanted = records(folder / "recompute", "train"), records(whole, "train")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in wanted], rel=1e-6)


@pytest.mark.slow
def test_float16_finds_its_loss_scale_and_trains(folder):
    train(
        folder,
        "half",
        *NO_EVAL,
        "model.model_config.compute_dtype=float16",
        "runner_config.max_steps=14",
        "runner_wrapper.scale_sense="
        "{type: DynamicLossScaleUpdateCell, loss_scale_value: 1.0e+9, scale_factor: 16, "
        "scale_window: 6}",
    )
    steps = records(folder / "half", "train")
    skipped = [record["skipped"] for record in steps]
    assert skipped[0] and not skipped[-1]
    for before, after in zip(steps, steps[1:], strict=False):
        if before["skipped"]:
            assert after["loss_scale"] == before["loss_scale"] / 16
    grown = [b["loss_scale"] > a["loss_scale"] for a, b in zip(steps, steps[1:], strict=False)]
    assert any(grown)
    assert steps[0]["lm_loss"] - steps[-1]["lm_loss"] > 0.3


CAPACITY = (
    "moe_config.capacity_factor=1.1",
    "model.model_config.num_layers=2",
    "moe_config.router_jitter=0.1",
    "moe_config.enable_sdrop=True",
    "do_eval=False",
    "runner_config.max_steps=4",
)


@pytest.fixture(scope="module")
def sdrop(folder):
    """Two layers that drop token by token, with jitter and TensorBoard."""
    train(folder, "sdrop", *CAPACITY, "tensorboard={tensorboard_dir: null}")
    return folder / "sdrop"


@pytest.mark.slow
def test_per_layer_fields(sdrop, whole):
    for output, layers in ((sdrop, 2), (whole, 1)):
        for record in records(output, "train"):
            loads = np.array(record["expert_load"])
            assert loads.shape == (layers, EXPERTS)
            np.testing.assert_allclose(loads.sum(1), 1, rtol=1e-5)
            assert len(record["drop_percent"]) == len(record["router_entropy"]) == layers
            assert all(0 < entropy <= math.log(EXPERTS) for entropy in record["router_entropy"])
    assert not any(any(record["drop_percent"]) for record in records(whole, "train"))


@pytest.mark.slow
def test_both_ways_to_drop_run_and_report_what_they_drop(folder, sdrop):
    train(folder, "kdrop", *CAPACITY, "moe_config.enable_sdrop=False")
    dropped = {}
    for name in ("sdrop", "kdrop"):
        steps = records(folder / name, "train")
        assert all(0 <= share < 50 for record in steps for share in record["drop_percent"])
        assert sum(share for record in steps for share in record["drop_percent"]) > 1
        dropped[name] = steps[0]["loss"]
    assert dropped["sdrop"] != dropped["kdrop"]


@pytest.mark.slow
def test_jitter_differs_each_step_and_resumes_exactly(folder, sdrop):
    tensorboard = "tensorboard={tensorboard_dir: null}"
    train(folder, "jitter", *CAPACITY, tensorboard, "runner_config.stop_at_step=3")
    train(folder, "jitter", *CAPACITY, tensorboard, "resume_training=True")
    assert_same_run(folder / "jitter", sdrop)


def test_tensorboard_events_hold_every_step(sdrop):
    found = list((sdrop / "tensorboard").glob("events.out.tfevents*"))
    assert len(found) == 1
    content = found[0].read_bytes()
    for tag in (b"train/grad_norm", b"train/learning_rate", b"expert_load/layer_1/expert_3"):
        assert content.count(tag) == 4


def test_trainer_takes_the_path_of_a_yaml(folder):
    assert Trainer(Path(folder / "run.yaml")).config.seed == 3
