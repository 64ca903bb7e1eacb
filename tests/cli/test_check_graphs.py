"""`python -m mixtral_ms check-graphs` as a user types it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.runs import ROOT, environment

from mixtral_ms.cli.commands.check_graphs import main
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.graphs.check_ranks import check_ranks
from mixtral_ms.graphs.results import RankJob

TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
EXPERTS = [
    *("--set", "use_parallel=True", "--set", "parallel_config.data_parallel=2"),
    *("--set", "parallel_config.expert_parallel=2", "--set", "moe_config.expert_num=4"),
    *("--set", "runner_config.gradient_accumulation_steps=2"),
]


def check_graphs(*arguments, package=ROOT):
    command = [sys.executable, "-m", "mixtral_ms", "check-graphs", "--config", str(TINY)]
    return subprocess.run(
        [*command, "--layers", "1", *arguments],
        cwd=package,  # python -m finds the package here first
        env={**environment(), "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_json(tmp_path):
    done = check_graphs(
        "--ranks", "last", *EXPERTS, "--json", "--save_graphs", str(tmp_path / "ir")
    )
    assert done.returncode == 0, done.stderr
    (rank,) = json.loads(done.stdout)["ranks"]
    (graph,) = rank["graphs"]
    assert (rank["rank"], rank["ranks"], rank["compiled_layers"]) == (1, 2, 1)
    assert (graph["name"], graph["error"], graph["runs"]) == ("forward and backward", "", 2)
    assert graph["facts"]["primitives"]["FlashAttentionScore"] == 1
    assert {one["primitive"] for one in graph["facts"]["collectives"]} >= {"AlltoAllV"}
    assert rank["step_reads"] > 0
    assert rank["peak_bytes"] < 4 << 30
    assert os.path.getsize(graph["file"]) > 0
    assert not (tmp_path / "rank_0").exists()


@pytest.mark.slow
def test_a_broken_line_is_named(tmp_path):
    """A function of MindSpore's in a cell that another cell's bprop calls."""
    shutil.copytree(ROOT / "mixtral_ms", tmp_path / "mixtral_ms")
    file = tmp_path / "mixtral_ms/parallel/comm/transports.py"
    whole, broken = file.read_text(encoding="utf-8"), "sum_over(receive_P + 1, 0) - 1"
    made = "sum_over(receive_P + 1, 0) + ops.arange(-1, 0, 1, dtype=mstype.int32)"
    assert broken in whole
    number = 1 + whole[: whole.index(broken)].count("\n")
    file.write_text(whole.replace(broken, made), encoding="utf-8")
    done = check_graphs("--ranks", "last", *EXPERTS, package=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"    at mixtral_ms/parallel/comm/transports.py:{number}\n" in done.stdout
    assert "not built: 1" in done.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--ranks", "second"], "'second' is none of first, last, all"),
        (["--set", "context.mode=1"], "context.mode 1"),
        (["--set", "moe_config.num_experts_chosen=99"], "num_experts_chosen"),
        (["--set", "moe_config.expert=4"], "moe_config.expert"),
    ],
)
def test_bad_input(arguments, told, capsys):
    assert run_command(main, ["--config", str(TINY), *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["0", "-1", "one"])
def test_layers_are_at_least_one(layers, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(TINY), "--layers", layers])
    assert ended.value.code == 2
    assert "whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, told",
    [
        ("kill -9 $$", "signal 9: too little memory?"),
        ("echo no module >&2; exit 3", "status 3\nno module"),
    ],
)
def test_a_process_that_ends(script, told, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (result,) = check_ranks([RankJob(str(TINY))])
    assert told in result.error
    assert not result.built


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "check-graphs --config research/mixtral_8x7b" in capsys.readouterr().out
