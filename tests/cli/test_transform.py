"""transform_ckpt.py as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import ROOT, environment
from helpers.sharded import contents, folder_hashes, network, write_whole

from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint
from mixtral_ms.cli.commands.transform import main
from mixtral_ms.cli.support.exit_status import run_command

TOOL = ROOT / "tools" / "transform_ckpt.py"


@pytest.fixture
def cut(tmp_path):
    """What a run of MindFormers leaves: files of 4 ranks named by step, strategies apart."""
    whole = write_whole(tmp_path / "whole.ckpt")
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="dp=2,mp=2,ep=2"))
    output = tmp_path / "output"
    for rank in range(4):
        folder = output / "checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        file = tmp_path / f"cut/rank_{rank}/checkpoint_{rank}.ckpt"
        file.rename(folder / f"llama_moe_rank_{rank}-1_20.ckpt")
        (folder / f"llama_moe_rank_{rank}-1_10.ckpt").write_bytes(b"an older one is not opened")
    (tmp_path / "cut" / "strategy").rename(output / "strategy")
    return output


def run(*argv):
    return run_command(main, [str(one) for one in argv])


@pytest.mark.slow
def test_the_reference_s_command_from_another_folder(cut):
    done = subprocess.run(
        [
            *(sys.executable, TOOL, "--src_ckpt_strategy", "output/strategy/"),
            *("--src_ckpt_dir", "output/checkpoint/", "--dst_ckpt_dir", "target_checkpoint/"),
            *("--prefix", "mixtral_"),
        ],
        cwd=cut.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = Path("target_checkpoint/rank_0/mixtral_0.ckpt")
    assert contents(cut.parent / written) == contents(cut.parent / "whole.ckpt")
    assert f"written:   {written}\n" in done.stdout
    assert "4 ranks" in done.stdout and "to:        1 rank, 70 tensors" in done.stdout
    assert "next:      python run_mindformer.py" in done.stdout


@pytest.mark.parametrize("none", ["None", ""])
def test_strategy_none_is_a_whole_checkpoint(tmp_path, none):
    whole = write_whole(tmp_path / "ckpt/rank_0/mixtral.safetensors")
    write_whole(tmp_path / "other.ckpt")
    cut, strategy = tmp_path / "cut", tmp_path / "strategies/strategy"
    transform(TransformOptions(tmp_path / "other.ckpt", strategy.parent, dst_strategy="mp=2"))
    flags = ["--src_ckpt_dir", tmp_path / "ckpt", "--src_ckpt_strategy", none]
    assert run(*flags, "--dst_ckpt_strategy", strategy, "--dst_ckpt_dir", cut) == 0
    one = tmp_path / "one"
    flags = ["--src_ckpt_dir", cut, "--src_strategy", "mp=2", "--dst_ckpt_strategy", none]
    assert run(*flags, "--dst_ckpt_dir", one, "--format", "ckpt", "--workers", 1) == 0
    assert dict(sorted(contents(one / "rank_0/checkpoint_0.ckpt").items())) == dict(
        sorted(contents(whole).items())
    )


def test_uneven_stages_take_the_offset_of_the_configuration(tmp_path, capsys):
    config = network(num_layers=3)
    whole = write_whole(tmp_path / "whole.ckpt", config=config, moments=False)
    flags = ["--src_ckpt_dir", whole, "--dst_ckpt_dir", tmp_path / "cut", "--dst_strategy", "pp=2"]
    assert run(*flags) == 2
    assert "set offset: [0, 1], for example" in capsys.readouterr().err
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "model:\n  model_config:\n    type: LlamaConfig\n    hidden_size: 24\n    num_layers: 3\n"
        "    num_heads: 4\n    n_kv_heads: 2\n    head_dim: 8\n    vocab_size: 64\n"
        "    intermediate_size: 40\n    offset: [1, 0]\nmoe_config:\n  expert_num: 4\n"
    )
    assert run(*flags, "--config", yaml) == 0
    first = contents(tmp_path / "cut/rank_0/checkpoint_0.ckpt")
    assert "model.layers.1.attention_norm.weight" in first
    yaml.write_text(yaml.read_text().replace("hidden_size: 24", "hidden_size: 48"))
    assert run(*flags, "--config", yaml, "--overwrite") == 2
    assert "hidden_size 48" in capsys.readouterr().err


def test_several_runs_in_one_folder(cut, capsys):
    for rank in range(4):
        folder = cut / "checkpoint" / f"rank_{rank}"
        (folder / f"other_rank_{rank}-9_9.ckpt").write_bytes(b"")
    target = cut.parent / "target"
    flags = ["--src_ckpt_dir", cut / "checkpoint", "--src_ckpt_strategy", cut / "strategy"]
    assert run(*flags, "--dst_ckpt_dir", target) == 2
    assert "--src_prefix" in capsys.readouterr().err
    assert run(*flags, "--dst_ckpt_dir", target, "--src_prefix", "llama_moe_") == 0
    assert verify_checkpoint(target) == []


def test_existing_target_and_overwrite(cut, capsys):
    target = cut.parent / "target"
    flags = ["--src_ckpt_dir", cut.parent / "whole.ckpt", "--dst_ckpt_dir", target]
    assert run(*flags, "--dst_strategy", "mp=2") == 0
    before = folder_hashes(target)
    assert run(*flags, "--dst_strategy", "mp=4") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert folder_hashes(target) == before
    assert run(*flags, "--dst_strategy", "mp=4", "--overwrite") == 0
    assert len(list(target.glob("rank_*"))) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--src_ckpt_dir", "nowhere"], "nowhere does not exist"),
        (["--src_ckpt_dir", "output/checkpoint"], "4 ranks: give the strategy"),
        (["--src_strategy", "mp=2,dp=1"], "--src_strategy mp=2,dp=1 is for 2 devices"),
        (["--src_strategy", "dp=4"], "dp=4 is not this checkpoint's strategy"),
        (["--src_strategy", "mp=two"], "mp"),
        (["--dst_strategy", "mp=2", "--dst_ckpt_strategy", "output/strategy"], "give one of them"),
        (["--src_ckpt_strategy", "output/nothing"], "no such strategy file"),
        (["--prefix", "a/b"], "--prefix 'a/b'"),
    ],
)
def test_bad_flags(cut, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(cut.parent)
    before = folder_hashes(cut)
    start = [] if "--src_ckpt_dir" in flags else ["--src_ckpt_dir", "output/checkpoint"]
    if not {"--src_strategy", "--src_ckpt_strategy", "--src_ckpt_dir"} & set(flags):
        start += ["--src_ckpt_strategy", "output/strategy"]
    assert run(*start, *flags, "--dst_ckpt_dir", "target") == 2
    error = capsys.readouterr().err
    assert any(one in error for one in message.split("|")), error
    assert "Traceback" not in error
    assert folder_hashes(cut) == before
    assert not Path("target").exists()


def test_help_shows_examples():
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_ms", "transform", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for word in ("examples:", "--dst_strategy dp=2,mp=2,ep=2,pp=2,zero=1", "--check_replicas"):
        assert word in done.stdout
