"""What goes wrong in training: signals, other inputs at a resume, damage, numbers that overflow."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import yaml
from helpers.runs import (
    SEQ_LENGTH,
    assert_same_run,
    command,
    environment,
    final_tensors,
    make_run,
    metrics_of,
    run_command,
    write_records,
)

from mixtral_ms import Trainer, load_config
from mixtral_ms.checkpoint.store.store import load_checkpoint, resolve_checkpoint, save_checkpoint
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_network
from mixtral_ms.train.state.rank_agreement import Storage
from mixtral_ms.train.state.resume import find_resume
from mixtral_ms.train.training_run import NotFiniteError

pytestmark = pytest.mark.slow

START_SECONDS = 120
# 44 rows, 2 of them a step: an epoch of 22 steps, in whose middle a signal comes
EPOCH, STEPS = 22, 44
LONG_EPOCHS = {"batch_size": 1, "epochs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    path = make_run(folder)
    write_records(folder / "long.mindrecord", 2 * EPOCH, seed=5)
    tree = yaml.safe_load(path.read_text())
    tree["runner_config"].update(LONG_EPOCHS)
    tree["train_dataset"]["data_loader"]["dataset_dir"] = str(folder / "long.mindrecord")
    tree["do_eval"] = False
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


def signalled(folder, output, number, *arguments):
    """Start a run, send it a signal after a few steps; (status, log)."""
    log = folder / "leg.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command("--config", folder / "run.yaml", "--output_dir", output, *arguments),
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while log.read_bytes().count(b"  loss ") < 3 and process.poll() is None:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.005)
        process.send_signal(number)
        return process.wait(START_SECONDS), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def last_step(output):
    return metrics_of(output)[-1]["step"]


@pytest.fixture(scope="module")
def terminated(folder):
    """A run that SIGTERM ended in its first epoch: (output, status, log)."""
    output = folder / "terminated"
    return output, *signalled(folder, output, signal.SIGTERM)


@pytest.fixture
def stopped(terminated, tmp_path):
    """A copy of the terminated run's output that a test may spoil."""
    return shutil.copytree(terminated[0], tmp_path / "stopped")


def test_sigterm_saves_and_says_how_to_go_on(terminated):
    output, status, log = terminated
    assert status == 128 + signal.SIGTERM
    step = last_step(output)
    assert 0 < step < STEPS and step % EPOCH
    assert resolve_checkpoint(output / "checkpoint").name == f"mixtral-step_{step:07d}"
    assert f"stopped by SIGTERM after step {step}" in log
    assert "the same command with --resume_training True" in log
    assert "Traceback" not in log


def test_sigterm_then_ctrl_c_then_the_end_is_one_run(folder, stopped):
    before = last_step(stopped)
    status, log = signalled(
        folder,
        stopped,
        signal.SIGINT,
        *("--resume_training", "True", "--set", "callbacks.0.async_save=True"),
    )
    # MindSpore turns a Ctrl-C that comes while a graph runs into SIGTERM
    names = {128 + signal.SIGINT: "SIGINT", 128 + signal.SIGTERM: "SIGTERM"}
    step = last_step(stopped)
    assert before < step < STEPS
    assert f"stopped by {names[status]} after step {step}" in log
    assert f"steps {before + 1} to {STEPS} of {STEPS}" in log
    config = [f"output_dir={stopped}", "resume_training=True"]
    Trainer(load_config(folder / "run.yaml", config)).train()
    Trainer(load_config(folder / "run.yaml", [f"output_dir={folder / 'whole'}"])).train()
    assert_same_run(stopped, folder / "whole")


def resume(folder, output, *overrides):
    given = [f"output_dir={output}", "resume_training=True", *overrides]
    return load_config(folder / "run.yaml", given)


def refusal(config):
    with pytest.raises(UserError) as caught:
        Trainer(config).train()
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "both"),
    [
        ("seed=4", "seed was 3 and is 4"),
        ("runner_config.batch_size=2", "batch_size was 1 and is 2"),
        (
            "runner_config.gradient_accumulation_steps=4",
            "micro_batches was 2 and is 4",
        ),
        ("train_dataset.data_loader.shuffle=False", "shuffle was True and is False"),
        ("train_dataset.data_loader.num_samples=40", "records was 44 and is 40"),
    ],
)
def test_a_resume_that_would_see_other_rows_is_refused(folder, stopped, override, both):
    before = (stopped / "metrics.jsonl").read_bytes()
    message = refusal(resume(folder, stopped, override))
    assert both in message
    assert "--resume_training False" in message
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_resume_with_other_data_is_refused(folder, stopped, tmp_path):
    write_records(tmp_path / "other.mindrecord", 2 * EPOCH, seed=6)
    other = f"train_dataset.data_loader.dataset_dir={tmp_path / 'other.mindrecord'}"
    assert "fingerprint was" in refusal(resume(folder, stopped, other))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "model.model_config.hidden_size=64",
            ["model.layers.0.attention_norm.weight has shape (32,), the network (64,)"],
        ),
        (
            "model.model_config.num_layers=2",
            ["model.layers.1.attention.wk.weight is missing", "10 tensors differ"],
        ),
        ("model.model_config.qkv_has_bias=True", ["model.layers.0.attention.wq.bias is missing"]),
    ],
)
def test_another_networks_checkpoint_is_refused_with_its_tensors(folder, stopped, override, parts):
    message = refusal(resume(folder, stopped, override))
    assert all(part in message for part in parts), message


def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_offered(folder, stopped):
    names = sorted(path.name for path in (stopped / "checkpoint").glob("mixtral-step_*"))
    newest, older = names[-1], names[-2]
    weights = stopped / "checkpoint" / newest / "rank_0" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 0x10
    weights.write_bytes(damaged)
    message = refusal(resume(folder, stopped))
    assert f"{newest} is damaged" in message
    assert f"to go on from it: {stopped / 'checkpoint' / older}" in message
    advice = message.split("to go on from it: ")[1].split()[0]
    given = resume(folder, stopped, f"load_checkpoint={advice}")
    assert find_resume(given, Mesh(), Storage()).folder.name == older


@pytest.fixture
def poisoned(terminated, tmp_path):
    """A checkpoint with one NaN in a weight."""
    good = load_checkpoint(resolve_checkpoint(terminated[0] / "checkpoint"))
    weights = {name: np.array(tensor) for name, tensor in good.tensors["model"].items()}
    weights["model.layers.0.attention.wo.weight"][3, 5] = np.nan
    groups = {"model": weights, "optimizer": dict(good.tensors["optimizer"])}
    return save_checkpoint(tmp_path / "poisoned", "base", groups, good.state)


def test_a_poisoned_weight_ends_the_run_with_its_name(folder, poisoned, tmp_path):
    output = tmp_path / "run"
    ended = run_command(
        *("--config", folder / "run.yaml", "--output_dir", output),
        *("--load_checkpoint", poisoned, "--set", "runner_wrapper.max_skipped_steps=3"),
        *("--set", "callbacks.0.save_checkpoint_steps=100"),
    )
    assert ended.returncode == 1
    failure = ended.stderr.splitlines()[-1]
    assert "3 steps in a row, up to step 3" in failure
    assert "model.layers.0.attention.wo.weight" in failure
    assert "Traceback" not in ended.stderr
    assert [record["skipped"] for record in metrics_of(output)] == [True] * 3


def test_an_absurd_learning_rate_stops_and_leaves_good_checkpoints(folder, stopped):
    good = final_tensors(stopped)
    before = resolve_checkpoint(stopped / "checkpoint")
    config = resume(
        folder,
        stopped,
        "lr_schedule.learning_rate=1.e+30",
        "runner_wrapper.max_skipped_steps=2",
        "callbacks.0.save_checkpoint_steps=1000",
    )
    with pytest.raises(NotFiniteError, match=r"2 steps in a row.* first not finite is the "):
        Trainer(config).train()
    assert resolve_checkpoint(stopped / "checkpoint") == before
    after = final_tensors(stopped)
    assert all(np.array_equal(after[name], good[name]) for name in good)


@pytest.mark.parametrize(
    ("scale", "where"),
    [("1.e+42", "the gradient of model.tok_embeddings"), ("1.e+30", "the sum of squares of all")],
)
def test_gradients_that_overflow_are_told_apart(folder, tmp_path, scale, where):
    config = load_config(
        folder / "run.yaml",
        [
            f"output_dir={tmp_path / 'run'}",
            f"runner_wrapper.scale_sense={scale}",
            "runner_wrapper.max_skipped_steps=2",
            "callbacks.0.async_save=True",
            "callbacks.0.save_checkpoint_steps=1",
        ],
    )
    with pytest.raises(NotFiniteError, match=f"first not finite is {where}"):
        Trainer(config).train()
    # the write under way has ended, and skipped steps changed no weight
    after = final_tensors(tmp_path / "run")
    for parameter in build_network(config, Mesh()).trainable_params():
        assert np.array_equal(parameter.asnumpy(), after[parameter.name])


def test_records_of_another_length_are_refused(folder, tmp_path):
    write_records(tmp_path / "short.mindrecord", 8, length=SEQ_LENGTH)
    config = load_config(
        folder / "run.yaml",
        [
            f"output_dir={tmp_path / 'run'}",
            f"train_dataset.data_loader.dataset_dir={tmp_path / 'short.mindrecord'}",
        ],
    )
    message = refusal(config)
    assert f"has {SEQ_LENGTH} input_ids" in message
    assert f"seq_length {SEQ_LENGTH} needs records of {SEQ_LENGTH + 1}" in message
    assert not (tmp_path / "run").exists()
