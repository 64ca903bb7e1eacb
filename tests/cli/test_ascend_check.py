"""scripts/ascend_check.sh, trying itself on a machine without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ascend_check(*arguments, cwd):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "ascend_check.sh"), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable},
    )


def rows(folder):
    """part -> (result, detail) of the table that it wrote."""
    lines = (folder / "ascend_check.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ", 2) for line in lines if line.startswith("| ")]
    return {part: (result, detail) for part, result, detail in cells[1:]}


@pytest.mark.slow
def test_losses_are_the_stored_ones_and_a_layer_is_measured(tmp_path):
    flags = ("--device", "CPU", "--devices", "1", "--parts", "training,layer", "--output", "out")
    done = ascend_check(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "out")
    assert found["training, 1 device"][0] == "passed"
    result, detail = found["layer"]
    assert result == "measured" and "GiB" in detail and "hidden_size 256" in detail
    assert "MindSpore" in (tmp_path / "out/ascend_check.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_two_and_eight_devices_train_alike(tmp_path):
    flags = ("--device", "CPU", "--devices", "2,8", "--parts", "training", "--output", tmp_path)
    done = ascend_check(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [result for result, _ in rows(tmp_path).values()] == ["passed", "passed"]


def test_other_losses_and_a_run_that_fails_are_said(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import ascend_check as script  # noqa: PLC0415 - only of that folder

    stored = json.loads(script.LOSSES.read_text(encoding="utf-8"))["losses"]
    monkeypatch.setattr(script, "write_data", lambda *_: None)
    options = script.Options("CPU", (1, 2, 8), ("training",), tmp_path, 1)
    answers = {
        1: [loss * 1.001 for loss in stored],
        2: stored[:-1],
        8: "status 1; training-8.log ends: error: no device",
    }
    monkeypatch.setattr(script, "tiny_losses", lambda _, devices: answers[devices])
    assert script.check(options) == 1
    found = rows(tmp_path)
    assert [result for result, _ in found.values()] == ["FAILED"] * 3
    assert "largest difference of a loss 1.0e-03 (bound 1e-04)" in found["training, 1 device"][1]
    assert found["training, 2 devices"][1].startswith("9 steps")
    assert "no device" in found["training, 8 devices"][1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--devices", "3"], "--devices 3: give some of 1, 2, 8"),
        (["--devices", "one"], "--devices one: give some of 1, 2, 8"),
        (["--parts", "weather"], "--parts weather: give some of kernels, training, layer"),
        (["--store_losses"], "give --device CPU"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path, flags, told, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import ascend_check as script  # noqa: PLC0415 - only of that folder

    with pytest.raises(script.UserError, match=told):
        script.main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
