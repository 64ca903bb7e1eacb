"""What inspect says of whole and of damaged checkpoints."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from helpers.sharded import folder_hashes, whole_tensors, write_tensors, write_whole

from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.store.store import save_checkpoint
from mixtral_ms.cli.commands.inspect import main
from mixtral_ms.cli.support.exit_status import run_command

WQ = "model.layers.0.attention.wq.weight"
GRID = "dp=2,mp=2,ep=2,pp=2,zero=1"


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    whole = write_whole(folder / "whole.safetensors")
    transform(TransformOptions(whole, folder / "cut", dst_strategy=GRID))
    return folder / "cut"


@pytest.fixture
def inspect(capsys):
    """Runs the command; returns its status and what it printed."""

    def run(*argv):
        status = run_command(main, [str(one) for one in argv])
        streams = capsys.readouterr()
        return status, streams.out + streams.err

    return run


@pytest.fixture
def as_json(inspect):
    def run(*argv):
        status, text = inspect(*argv, "--json")
        lines = text.splitlines()
        return status, json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1]))

    return run


def test_ranks(cut, inspect, as_json):
    before = folder_hashes(cut)
    status, text = inspect(cut)
    assert status == 0, text
    assert "ranks:      8, dp=2,mp=2,ep=2,pp=2,zero=1 (8 ranks)" in text
    assert "manifest:   every file and tensor has its hash" in text
    assert "model.layers.0-1.attention.wq.weight (2)" in text
    assert "problems: none" in text
    status, found = as_json(cut, "--hash")
    assert (status, found["problems"], len(found["tensors"])) == (0, [], 70)
    moment = found["tensors"]["adam_m." + WQ]
    assert (moment["shape"], moment["local_shape"]) == ([32, 24], [8, 24])
    array, _ = whole_tensors()["adam_m." + WQ]
    assert moment["sha256"] == hashlib.sha256(array.tobytes()).hexdigest()
    assert folder_hashes(cut) == before


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_one_file(tmp_path, inspect, suffix):
    status, text = inspect(write_whole(tmp_path / f"mixtral.{suffix}", "bfloat16"), "--all")
    assert status == 0
    assert f"{suffix}, names: ours" in text
    assert "manifest:   none" in text
    line = next(line for line in text.splitlines() if line.startswith(WQ))
    assert line.split()[1:] == ["bfloat16", "[32,", "24]"]


def test_our_checkpoints_by_their_folder(tmp_path, inspect):
    arrays = {name: array for name, (array, _) in whole_tensors(moments=False).items()}
    arrays.pop("global_step")
    for step in (1, 2):
        save_checkpoint(tmp_path, f"m-step_000000{step}", {"model": arrays}, {"step": step})
    status, text = inspect(tmp_path)
    assert status == 0, text
    assert "m-step_0000002" in text and "step:       2" in text


def test_hugging_face_folder(tmp_path, inspect):
    names = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for file, letter in names.items():
        tensor = (np.ones((2, 3), np.uint16), "bfloat16")
        write_tensors(tmp_path / file, {f"model.layers.0.self_attn.{letter}_proj.weight": tensor})
    index = {f"model.layers.0.self_attn.{b}_proj.weight": a for a, b in names.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    status, text = inspect(tmp_path)
    assert status == 0 and "tensors:    2, 24 bytes" in text
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    status, text = inspect(tmp_path)
    assert status == 1
    assert "lacks model-00002-of-00002.safetensors" in text


def test_all_problems_are_listed(cut, tmp_path, inspect):
    shutil.copytree(cut, tmp_path / "cut")
    cut = tmp_path / "cut"
    first, second = cut / "rank_1/checkpoint_1.safetensors", cut / "rank_6/checkpoint_6.safetensors"
    first.write_bytes(first.read_bytes()[:-10])
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    (cut / "rank_3/extra.safetensors").write_bytes(b"")
    status, text = inspect(cut)
    assert status == 1
    for problem in (
        "rank_1/checkpoint_1.safetensors is truncated",
        "rank_6/checkpoint_6.safetensors: tensor",
        "rank_3/extra.safetensors is not in the manifest",
    ):
        assert problem in text


def test_missing_rank_without_a_manifest(cut, tmp_path, inspect):
    shutil.copytree(cut, tmp_path / "cut")
    for name in ("manifest.json", "manifest.sha256"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "rank_7")
    status, text = inspect(tmp_path / "cut")
    assert status == 1 and "for 8 devices" in text
    shutil.rmtree(tmp_path / "cut" / "rank_2")
    assert "has no folder rank_2" in inspect(tmp_path / "cut")[1]


def test_a_network_that_is_not_whole(tmp_path, inspect):
    tensors = whole_tensors()
    del tensors["model.layers.1.attention.wo.weight"], tensors["adam_v." + WQ]
    status, text = inspect(write_tensors(tmp_path / "mixtral.ckpt", tensors))
    assert status == 1
    assert "model.layers.1.attention.wo.weight is missing" in text
    assert f"adam_m.{WQ} is there, adam_v.{WQ} is not" in text


def test_wrong_grid(cut, inspect):
    status, text = inspect(cut, "--grid", "dp=4,mp=2")
    assert status == 1 and "strategy" in text.split("problems:")[1]


def test_nothing_there(tmp_path, inspect):
    status, text = inspect(tmp_path / "nowhere")
    assert (status, text) == (2, f"error: {tmp_path / 'nowhere'} does not exist\n")
    assert inspect(tmp_path)[0] == 1


def test_names_forge_no_line(tmp_path, inspect):
    from safetensors.numpy import save_file  # noqa: PLC0415

    forged = "a\nproblems: none\x1b[2J\r"
    folder = tmp_path / "b\nproblems: none"
    folder.mkdir()
    save_file({forged: np.zeros(2, np.float32)}, folder / "w.safetensors")
    _, text = inspect(folder / "w.safetensors")
    assert "a\\nproblems: none\\x1b[2J\\r  float32" in text
    assert "\x1b" not in text
    (folder / "w.safetensors").write_bytes(b"no weights")
    status, text = inspect(folder / "w.safetensors")
    assert status != 0
    assert "problems: none" not in text.splitlines()
