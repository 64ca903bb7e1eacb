"""What the data, or the length of a run, does not let come about is said before the first step."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.runs import EVAL_ROWS, TRAIN_ROWS, make_run, tiny_config

from mixtral_ms.config import MixtralConfig, load_config
from mixtral_ms.config.loading.resolve import dataset_of
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.announcement import limits
from mixtral_ms.train.builders import build_loader
from mixtral_ms.train.sample_answers import _prompts_and_answers
from mixtral_ms.train.step_plan import plan_steps

RECORDS = 24  # 3 steps an epoch of 2 micro batches of 4
STEADY = ("lr_schedule.warmup_steps=2", "runner_config.epochs=1")


def said(tmp_path, *overrides, records=RECORDS):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    config = load_config(path, [*STEADY, *overrides])
    used = min(records, config.train_dataset.data_loader.num_samples or records)
    plan = plan_steps(config.runner_config, used // 4, "data", Mesh().grid)
    return list(limits(config, plan, used))


LIMITS = [
    (["lr_schedule.warmup_steps=5000"], 24, "warm-up of 5000 steps is longer than the run of 3"),
    (["lr_schedule.warmup_steps=3"], 24, "warm-up of 3 steps is longer than the run of 3"),
    (
        ["lr_schedule.warmup_steps=null", "lr_schedule.warmup_ratio=0.9"]
        + ["lr_schedule.total_steps=100"],
        24,
        "warm-up of 90 steps is longer than the run of 3: learning_rate 0.01 is never reached",
    ),
    (["lr_schedule.total_steps=2"], 24, "lr_schedule.total_steps 2 is not that of the run, 3"),
    (["runner_config.stop_at_step=9"], 24, "stop_at_step 9 is behind the last step, 3"),
    ([], 30, "6 of 30 records are left out in each epoch: they do not fill a step of 8"),
    (["train_dataset.data_loader.num_samples=9"], 24, "1 of 9 records are left out in each"),
]


@pytest.mark.parametrize(("overrides", "records", "line"), LIMITS)
def test_a_limit_is_one_line(tmp_path, overrides, records, line):
    lines = said(tmp_path, *overrides, records=records)
    assert len([one for one in lines if line in one]) == 1, lines


QUIET = [
    [],
    ["lr_schedule=null", "optimizer.learning_rate=0.1"],
    ["runner_config.stop_at_step=2"],
    ["train_dataset.data_loader.num_samples=16", "lr_schedule.warmup_steps=1"],
    ["lr_schedule.total_steps=3"],
]


@pytest.mark.parametrize("overrides", QUIET)
def test_what_comes_about_needs_no_line(tmp_path, overrides):
    assert said(tmp_path, *overrides) == []


@pytest.mark.parametrize("training", [True, False])
def test_more_samples_than_there_are_is_said(tmp_path, capsys, training):
    make_run(tmp_path)
    name, held = ("train", TRAIN_ROWS) if training else ("eval", EVAL_ROWS)
    for wanted, lines in ((held + 1, 1), (held, 0), (held - 1, 0)):
        key = f"{name}_dataset.data_loader.num_samples"
        config = load_config(tmp_path / "run.yaml", [f"{key}={wanted}"])
        build_loader(config, dataset_of(config, training=training), Mesh(), training=training)
        said = f"{key} is {wanted}, and the data has {held} records"
        assert capsys.readouterr().err.count(said) == lines


@pytest.mark.parametrize(("wanted", "lines"), [(3, 1), (2, 0), (1, 0)])
def test_fewer_prompts_than_rows_is_said(capsys, wanted, lines):
    ids = np.arange(1, 33, dtype=np.int32).reshape(4, 8)
    labels = np.where(np.arange(8) < 4, -100, ids)
    labels[2:] = -100  # two records have nothing to answer
    loader = SimpleNamespace(batches=lambda epoch: iter([Batch(ids, labels)]))
    found = _prompts_and_answers(loader, wanted, 8, MixtralConfig())
    assert len(found) == min(wanted, 2)
    said = "SampleMonitor.rows is 3, and 2 records have a prompt"
    assert capsys.readouterr().err.count(said) == lines
