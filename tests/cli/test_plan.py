"""`python -m mixtral_ms plan` as a user types it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.runs import ROOT, environment, make_run

from mixtral_ms.cli.commands.plan import main
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.config import load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.config.loading.overrides import Override
from mixtral_ms.config.loading.resolve import rank_count
from mixtral_ms.parallel.planner.memory_model import memory_plan

BIG = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
PREDICT = ROOT / "research/mixtral_8x7b/predict_mixtral-8x7b.yaml"
TWO = ("--devices", "2", "--memory", "64GB")
SIXTEEN = ("--config", BIG, "--devices", "16", "--memory", "64GB")


def plan(*arguments):
    return run_command(main, [str(one) for one in arguments])


def overrides(path):
    """The written sections as overrides, key by key."""
    found = []
    for section, values in yaml.safe_load(path.read_text()).items():
        keys = values.items() if isinstance(values, dict) else [(None, values)]
        found += [Override(f"{section}.{key}" if key else section, v, str(path)) for key, v in keys]
    return found


@pytest.mark.parametrize("document", ["README.md", "README_CN.md", "docs/parallel.md"])
@pytest.mark.slow
def test_the_documents_commands(document, tmp_path, monkeypatch, capsys):
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = re.findall(r"python -m mixtral_ms plan (--config [^\n`]+)", text)
    assert commands
    (tmp_path / "research").symlink_to(ROOT / "research")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        Path("layout.yaml").unlink(missing_ok=True)
        assert plan(*shlex.split(command)) == 0
        assert "grids fit" in capsys.readouterr().out
        assert Path("layout.yaml").exists() == ("--write" in command)


def test_the_command_of_the_help():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mixtral_ms", "plan", "--config", str(BIG)),
            *("--devices", "16", "--memory", "64GB", "--top", "3"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("16 devices, 8 a host, 57.6 GiB usable on each: ")
    assert lines[1] == "a step of 128 sequences, 524,288 tokens; micro batches of 1 sequence"
    assert lines[3].split()[:6] == ["#", "dp", "mp", "ep", "pp", "cp"]
    assert [line.split()[0] for line in lines[4:7]] == ["1", "2", "3"]
    own = lines.index(next(line for line in lines if line.startswith("the file's own layout fits")))
    assert lines[own + 1].split()[:6] == ["8", "1", "8", "2", "1", "16"]
    assert "51.7 GiB" in lines[own + 1]
    assert lines[own + 2].startswith("its step: products ") and "waiting" in lines[own + 2]
    assert any(line.startswith("assumed: 320 TFLOP/s at 40%, memory 1600 GB/s") for line in lines)
    assert any("too large" in line for line in lines)
    assert any("stage 0 needs 77.2 GiB of 57.6 GiB, most of it gradients" in one for one in lines)
    assert any("n_kv_heads 8 is not divisible by" in line for line in lines)


@pytest.mark.parametrize("choose", ["1", "4"])
def test_what_is_written_loads_next_to_the_yaml(tmp_path, capsys, choose):
    written = tmp_path / "layout.yaml"
    arguments = ("--choose", choose, "--write", written, "--json")
    assert plan(*SIXTEEN, *arguments) == 0
    shown = json.loads(capsys.readouterr().out)["fitting"][int(choose) - 1]
    config = load_config(BIG, overrides(written))
    check_config(config, world_size=None, needs_paths=False)
    assert rank_count(config) == 16
    got = [rank.total for rank in memory_plan(config)]
    assert got == [rank["total"] for rank in shown["memory"]]
    # the comment says the same as flags of the run command
    flags = [
        line.removeprefix("#").strip().removesuffix("\\")
        for line in written.read_text().splitlines()
        if line.startswith("#   ")
    ]
    words = shlex.split(" ".join(flags))
    assert words[:2] == ["--use_parallel", "True"]
    same = load_config(BIG, ["use_parallel=True", *words[3::2]])
    assert (same.parallel_config, same.runner_config) == (
        config.parallel_config,
        config.runner_config,
    )
    assert same.recompute_config == config.recompute_config and same.parallel == config.parallel


def test_json_holds_what_the_table_shows(capsys):
    assert plan(*SIXTEEN, "--json", "--top", "2", "--fix", "cp=1,mp=1") == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["fitting"]) == 2 <= data["fitting_grids"]
    for one in data["fitting"]:
        assert one["sections"]["parallel_config"]["model_parallel"] == 1
        for rank in one["memory"]:
            parts = ("parameters", "gradients", "optimizer", "activations")
            assert rank["total"] == sum(rank[part] for part in parts) <= data["cluster"]["memory"]
    assert data["own"]["grid"] == "dp=8,mp=1,ep=8,pp=2,zero=1"
    assert data["cluster"]["memory"] == 0.9 * 64 * 2**30


def test_mixtral_answers_on_two_devices_in_float16(capsys):
    flags = ("--set", "parallel_config.model_parallel=2", "--set", "weight_dtype=float16")
    assert plan("--config", PREDICT, "--run_mode", "predict", *TWO, *flags, "--json") == 0
    own = json.loads(capsys.readouterr().out)["own"]
    assert own["memory"]["total"] < 0.9 * 64 * 2**30
    alone, batch = own["steps"]
    assert alone["bound_by"] == batch["bound_by"] == "weights"
    # half of what a token meets, without the embedding; half of all for 32 sequences
    met, rows = 12_879_925_248, 32000 * 4096
    assert alone["weight_bytes"] == pytest.approx(met - rows, rel=0.01)
    assert batch["weight_bytes"] == pytest.approx(46_702_792_704 - rows, rel=0.01)
    assert alone["weights"] > 0.8 * alone["seconds"]
    assert plan("--config", PREDICT, *TWO, "--set", "weight_dtype=float32", "--top", "1") == 0
    said = capsys.readouterr().out
    assert "mp=2,ep=1, weight_dtype float32: 87.9 GiB of 57.6 GiB" in said
    assert "estimates; assumed:" in said and "read at 1,600 GB/s" in said


def test_a_layout_replaces_no_file_unasked(tmp_path, capsys):
    yaml = tmp_path / "run.yaml"
    yaml.write_text(BIG.read_text())
    flags = ("--config", yaml, "--devices", "16", "--memory", "64GB")
    assert plan(*flags, "--write", yaml, "--overwrite") == 2
    assert f"--write {yaml}: is read too (--config" in capsys.readouterr().err
    (tmp_path / "mine").write_text("mine")
    assert plan(*flags, "--write", tmp_path / "mine") == 2
    assert "mine exists; give --overwrite" in capsys.readouterr().err
    assert (yaml.read_text(), (tmp_path / "mine").read_text()) == (BIG.read_text(), "mine")
    assert plan(*flags, "--write", tmp_path / "mine", "--overwrite") == 0
    assert (tmp_path / "mine").read_text() != "mine"


def test_nothing_fits(tmp_path, capsys):
    written = tmp_path / "layout.yaml"
    small = ("--config", BIG, "--devices", "2", "--memory", "64GB")
    assert plan(*small) == 1
    out = capsys.readouterr().out
    assert "0 grids fit" in out and "of 57.6 GiB, most of it" in out
    assert "the file's own layout is not among them: for 16 devices" in out
    assert plan(*small, "--write", written) == 2
    assert "--choose 1: 0 layouts fit" in capsys.readouterr().err and not written.exists()


def test_a_run_without_use_parallel_is_planned_too(tmp_path, capsys):
    config = make_run(tmp_path)
    flags = ("--config", config, "--devices", "4", "--memory", "1GB")
    assert plan(*flags, "--global_batch", "16") == 0
    assert (
        "a step of 16 sequences, 512 tokens; micro batches of 4 sequences"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--fix", "tp=2"), "--fix 'tp=2'"),
        (("--fix", "mp"), "--fix 'mp'"),
        (("--set", "run_mode=eval"), "run_mode eval: layouts are planned for training and for"),
        (("--run_mode", "predict", "--write", "layout.yaml"), "--write with run_mode predict"),
        (("--set", "parallel_config.data_paralel=2"), "did you mean"),
        (("--set", "moe_config.num_experts_chosen=9"), "num_experts_chosen 9 is more than"),
        (("--set", "model.model_config.pet_config={target_modules: '('}"), "not a regular"),
    ],
)
def test_bad_input(capsys, flags, said):
    assert plan(*SIXTEEN, *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--memory", "64XB"),
        ("--memory", "GB"),
        ("--usable", "1.5"),
        ("--devices", "0"),
        ("--bandwidth_between", "-1"),
        ("--efficiency", "nan"),
    ],
)
def test_bad_numbers(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        plan(*SIXTEEN, *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
