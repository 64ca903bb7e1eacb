"""convert_weight.py as users of MindFormers type it, and what it refuses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.convert_oracle import MAKERS, huggingface, write_source

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.cli.commands.convert import main
from mixtral_ms.cli.commands.transform import main as transform
from mixtral_ms.cli.support.exit_status import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    write_source(tmp_path / "torch_ckpt_dir", "hf")
    return tmp_path


def command(folder, text):
    """Run a command line of the reference with its paths filled in, in this process."""
    words = shlex.split(text.replace("\\\n", " ").replace("{path}", str(folder)))
    assert words[:2] == ["python", "convert_weight.py"]
    return run_command(main, words[2:])


def tensors(path):
    source = open_tensors(path)
    return {name: source.read(name) for name in source.infos}


def half(weights):
    return {name: value.astype(np.float16) for name, value in weights.items()}


def assert_holds(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value, name)


TO_MINDSPORE = """\
python convert_weight.py \\
--model mixtral \\
--input_path {path}/torch_ckpt_dir \\
--output_path {path}/ms_ckpt_path/mixtral.ckpt \\
--dtype fp16
"""
REVERSED = """\
python convert_weight.py \\
--model mixtral \\
--reversed \\
--input_path {path}/ms_ckpt_path/mixtral.ckpt \\
--output_path {path}/torch_again/ \\
--dtype fp16
"""
REVERSED_SHARDED = """\
python convert_weight.py \\
--model mixtral \\
--reversed \\
--input_path {path}/sharded/ \\
--output_path {path}/torch_again/ \\
--dtype fp16 \\
--strategy_dir {path}/strategy_dir
"""
OLDER = (
    "python convert_weight.py --use_gmm={gmm} --dtype='fp16' {source} --mindspore_ckpt_path={to}"
)


def test_there_and_back(folder, capsys):
    assert command(folder, TO_MINDSPORE) == 0
    expected = half(huggingface(3))
    assert_holds(tensors(folder / "ms_ckpt_path" / "mixtral.ckpt"), MAKERS["ours"](expected))
    out = capsys.readouterr().out
    assert re.search(r"written: .*mixtral\.ckpt in [\d.]+ s, [\d,]+ MB/s", out)
    assert "each of 35 tensors read once, each of 23 written once" in out
    assert "next:      mindspore.load_checkpoint(" in out
    assert command(folder, REVERSED) == 0
    assert_holds(tensors(folder / "torch_again" / "model.safetensors"), expected)
    assert "from_pretrained(" in capsys.readouterr().out


def test_from_the_ranks_of_a_distributed_run(folder):
    assert command(folder, TO_MINDSPORE) == 0
    cut = "dp=2,mp=2,pp=2"
    status = run_command(
        transform,
        shlex.split(
            f"--src_ckpt_dir {folder}/ms_ckpt_path/mixtral.ckpt --dst_ckpt_dir {folder}/sharded "
            f"--dst_strategy {cut} --format ckpt"
        ),
    )
    assert status == 0
    (folder / "sharded" / "strategy").rename(folder / "strategy_dir")
    for name in ("manifest.json", "manifest.sha256"):  # MindSpore's own runs have none
        (folder / "sharded" / name).unlink()
    (folder / "sharded" / "config.json").write_bytes(
        (folder / "torch_ckpt_dir" / "config.json").read_bytes()
    )
    assert len(list((folder / "sharded").glob("rank_*"))) == 8
    assert command(folder, REVERSED_SHARDED) == 0
    assert_holds(tensors(folder / "torch_again" / "model.safetensors"), half(huggingface(3)))


@pytest.mark.parametrize("gmm", ["True", "False"])
def test_the_older_form_from_pytorch(folder, gmm):
    source = "--torch_ckpt_dir={path}/torch_ckpt_dir"
    text = OLDER.format(gmm=gmm, source=source, to="{path}/new_mixtral.ckpt")
    assert command(folder, text) == 0
    expected = MAKERS["gmm" if gmm == "True" else "ours"](half(huggingface(3)))
    assert_holds(tensors(folder / "new_mixtral.ckpt"), expected)


def test_the_older_form_from_mindspore_and_back(folder):
    assert command(folder, TO_MINDSPORE) == 0
    source = "--pre_ckpt_path={path}/ms_ckpt_path/mixtral.ckpt"
    text = OLDER.format(gmm="True", source=source, to="{path}/new_mixtral.ckpt")
    assert command(folder, text) == 0
    expected = half(huggingface(3))
    assert_holds(tensors(folder / "new_mixtral.ckpt"), MAKERS["gmm"](expected))
    source = "--pre_ckpt_path={path}/new_mixtral.ckpt"
    text = OLDER.format(gmm="False", source=source, to="{path}/stacked.ckpt")
    assert command(folder, text) == 0
    assert_holds(tensors(folder / "stacked.ckpt"), MAKERS["ours"](expected))


def test_the_older_form_gives_fp16_unless_told(folder):
    text = "python convert_weight.py --torch_ckpt_dir {path}/torch_ckpt_dir --mindspore_ckpt_path "
    assert command(folder, text + "{path}/a.ckpt") == 0
    assert_holds(tensors(folder / "a.ckpt"), MAKERS["ours"](half(huggingface(3))))
    assert command(folder, text + "{path}/b.ckpt --dtype=fp32") == 0
    assert_holds(tensors(folder / "b.ckpt"), MAKERS["ours"](huggingface(3)))


@pytest.mark.parametrize(
    "start", [["convert_weight.py"], ["-m", "mixtral_ms", "convert"]], ids=["script", "module"]
)
def test_as_a_process_from_another_folder(folder, start):
    script = [str(ROOT / word) if word.endswith(".py") else word for word in start]
    result = subprocess.run(
        [sys.executable, *script, "--input_path", "torch_ckpt_dir", "--output_path", "m.ckpt"],
        cwd=folder,
        env=os.environ | ({} if "-m" not in start else {"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_holds(tensors(folder / "m.ckpt"), MAKERS["ours"](huggingface(3)))


def test_dry_run_prints_the_mapping_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert command(folder, TO_MINDSPORE + "--dry_run --use_gmm True") == 0
    out = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    name = "model.layers.1.feed_forward.routed_experts.ffn.w2.weight"
    experts = "model.layers.1.block_sparse_moe.experts"
    assert (
        f"{name} (3, 10, 12) float32 -> float16 <- {experts}.0.w2.weight ... {experts}.2.w2.weight"
        ", transposed" in out
    )
    assert len(re.findall("<-", out)) == 23


def test_losses_of_float16_are_a_table(folder, capsys):
    path = folder / "torch_ckpt_dir" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["lm_head.weight"].flat[:3] = [1e6, -1e6, 1e-30]
    safetensors.numpy.save_file(weights, path)
    assert command(folder, TO_MINDSPORE) == 0
    out = capsys.readouterr().out
    assert "WARNING:   float16 cannot hold values of 1 tensors" in out
    assert re.search(r"\n +2 +1  lm_head\.weight\n", out)


def test_what_is_left_out_is_said(folder, capsys):
    path = folder / "torch_ckpt_dir" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    safetensors.numpy.save_file(weights | {name: np.ones(3, np.float32)}, path)
    assert command(folder, TO_MINDSPORE) == 0
    assert f"left out:  1 tensors that are no weights, as {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--output_path o", "one of --input_path, --torch_ckpt_dir, --pre_ckpt_path must be"),
        ("--input_path i", "one of --output_path, --mindspore_ckpt_path must be given"),
        ("--input_path i --torch_ckpt_dir t --output_path o", "--input_path and --torch_ckpt_dir"),
        ("--input_path i --mindspore_ckpt_path o", "--input_path does not go with --minds"),
        ("--torch_ckpt_dir i --output_path o", "--torch_ckpt_dir does not go with --output"),
        ("--input_path i --output_path o --reversed --use_gmm True", "contradict each other"),
        ("--input_path i --output_path o --to hf --use_gmm False", "contradict each other"),
        ("--pre_ckpt_path i --mindspore_ckpt_path o --reversed", "--reversed goes with"),
        ("--input_path i --output_path o.ckpt", "--input_path: i does not exist"),
        ("--torch_ckpt_dir i --mindspore_ckpt_path o.ckpt", "--torch_ckpt_dir: i does not exist"),
        ("--reversed --input_path i --output_path o.ckpt", "Hugging Face's format is a folder"),
    ],
)
def test_flags_that_do_not_go_together(flags, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, shlex.split(flags)) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--model llama", "invalid choice: 'llama'"),
        ("--use_gmm maybe", "'maybe' given: write True or False"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--max_shard_size five", "'five' is not a size"),
        ("--workers 0", "'0' is not a whole number above 0"),
        ("--input_pat x", "unrecognized arguments"),
    ],
)
def test_values_that_cannot_be(flags, expected, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(shlex.split(f"--input_path i --output_path o {flags}"))
    assert leaving.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, limit", [("1KB", 1000), ("4000", 4000), ("5GB", 5 * 10**9), ("1m", 10**6)]
)
def test_sizes_of_files(folder, size, limit):
    text = "python convert_weight.py --input_path {path}/torch_ckpt_dir --output_path {path}/o "
    assert command(folder, f"{text} --to hf --max_shard_size {size}") == 0
    files = [tensors(file) for file in (folder / "o").glob("model*.safetensors")]
    sizes = [sum(value.nbytes for value in file.values()) for file in files]
    assert_holds({name: value for file in files for name, value in file.items()}, huggingface(3))
    assert all(size <= limit or len(file) == 1 for size, file in zip(sizes, files, strict=True))
    assert len(files) <= max(1, 2 * sum(sizes) / limit)


def test_a_damaged_input_is_bad_input(folder, capsys):
    path = folder / "torch_ckpt_dir" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert command(folder, TO_MINDSPORE) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (folder / "ms_ckpt_path").exists()


def test_help_has_examples_and_formats(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert "python convert_weight.py --model mixtral --reversed" in out
    for name in MAKERS:
        assert f"  {name} " in out
