"""What the data, or the length of a run, does not let come about is said before the first step."""

import pytest
import yaml
from helpers.runs import tiny_config

from mixtral_ms.config import load_config
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.announcement import limits
from mixtral_ms.train.step_plan import plan_steps

RECORDS = 24  # 3 steps an epoch of 2 micro batches of 4
STEADY = ("lr_schedule.warmup_steps=2", "runner_config.epochs=1")


def said(tmp_path, *overrides, records=RECORDS):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    config = load_config(path, [*STEADY, *overrides])
    used = min(records, config.train_dataset.data_loader.num_samples or records)
    plan = plan_steps(config.runner_config, used // 4, "data", Mesh().grid)
    return list(limits(config, plan, used, records))


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
    (["train_dataset.data_loader.num_samples=99"], 24, "num_samples is 99, and the data has 24"),
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
