"""Resharding of damaged and wrong input, full disks and kills: an error, and nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.runs import environment
from helpers.sharded import (
    contents,
    folder_hashes,
    network,
    whole_tensors,
    write_tensors,
    write_whole,
)

from mixtral_ms.checkpoint.formats.mindspore_ckpt_format import CkptSource
from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError
from mixtral_ms.checkpoint.reshard import rewrite as reshard
from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.store.atomic_folder import new_folder
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint
from mixtral_ms.errors import BusyError, UserError

GRID = "dp=2,mp=2,ep=2,pp=2"
FORMATS = ["ckpt", "safetensors"]
FILES = ["rank_5/checkpoint_5.{}", "strategy/ckpt_strategy_rank_3.ckpt", "manifest.json"]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """The same network cut for 8 ranks, in both formats."""
    folder = tmp_path_factory.mktemp("cuts")
    whole = write_whole(folder / "whole.safetensors")
    for format_ in FORMATS:
        transform(TransformOptions(whole, folder / format_, dst_strategy=GRID, format=format_))
    return folder


@pytest.fixture(params=FORMATS)
def cut(cuts, tmp_path, request):
    """A copy of a checkpoint of 8 ranks that a test may damage."""
    shutil.copytree(cuts / request.param, tmp_path / request.param)
    return tmp_path / request.param


def rank_file(folder, rank):
    return next((folder / f"rank_{rank}").iterdir())


def without_manifest(folder):
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    return folder


def assert_refused(source, match, **options):
    """Merging ends with an error; source and an earlier target are what they were."""
    target = source.parent / "target"
    write_whole(target / "rank_0/checkpoint_0.ckpt")
    before = folder_hashes(source.parent)
    with pytest.raises((UserError, DamagedFileError), match=match):
        transform(TransformOptions(source, target, overwrite=True, **options))
    assert folder_hashes(source.parent) == before
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]


# Damage


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_missing_rank(cut, rank, manifest):
    shutil.rmtree(cut / f"rank_{rank}")
    if not manifest:
        without_manifest(cut)
    assert_refused(cut, f"rank_{rank}|files of 7")


@pytest.mark.parametrize("manifest", [True, False])
def test_truncated(cut, manifest):
    file = rank_file(cut, 6)
    if not manifest:
        without_manifest(cut)
    size = file.stat().st_size
    for kept in (size - 1, size // 2, 5, 0):
        os.truncate(file, kept)
        assert_refused(cut, f"{file.name}.*(truncated|damaged|no safetensors|is empty)")
        shutil.rmtree(cut.parent / "target")


@pytest.mark.parametrize("manifest", [True, False])
def test_cut_at_a_message_boundary(cuts, tmp_path, manifest):
    """MindSpore loads such a file without an error."""
    shutil.copytree(cuts / "ckpt", tmp_path / "cut")
    file = rank_file(tmp_path / "cut", 2)
    tensors = {
        name: (np.frombuffer(data, dtype).reshape(shape), dtype)
        for name, (shape, dtype, data) in contents(file).items()
    }
    whole = file.read_bytes()
    names = list(tensors)
    write_tensors(file, {name: tensors[name] for name in names[:9]})
    part = file.read_bytes()
    assert whole.startswith(part)
    assert len(CkptSource(file).infos) == 9
    if manifest:
        assert_refused(tmp_path / "cut", "rank_2/checkpoint_2.ckpt is truncated")
    else:
        match = f"rank 2 has no tensor {names[9]}".replace(".", r"\.")
        assert_refused(without_manifest(tmp_path / "cut"), match)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_with_a_manifest(cut, name):
    file = cut / name.format(cut.name)
    random_bytes, before = random.Random(name), file.read_bytes()
    for _ in range(12):
        data = bytearray(before)
        data[random_bytes.randrange(len(data))] ^= 1 << random_bytes.randrange(8)
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"damaged.*{file.name}"):
            open_source(cut, strategy=cut / "strategy")
    file.write_bytes(before)
    assert verify_checkpoint(cut) == []


def test_a_flipped_bit_in_a_replica_is_found_without_a_manifest(cut):
    file = rank_file(without_manifest(cut), 2)
    name = "model.layers.0.attention.wk.weight"
    data = bytearray(file.read_bytes())
    data[data.find(open_tensors(file).read(name).tobytes()) + 100] ^= 1
    file.write_bytes(data)
    # rank 0 holds the same part
    assert_refused(cut, f"{name} differs between rank 0 and rank 2")


def test_replicas_as_large_as_the_samples_are_compared_in_full(tmp_path):
    config = network(hidden_size=500, num_layers=1)
    whole = write_whole(tmp_path / "whole.ckpt", config=config, moments=False)
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="dp=2"))
    file = rank_file(without_manifest(tmp_path / "cut"), 1)
    name = "model.tok_embeddings.embedding_weight"
    values = open_tensors(file).read(name)
    data = bytearray(file.read_bytes())
    at = data.find(values.tobytes()) + values.nbytes // 2
    data[at] ^= 1
    file.write_bytes(data)
    assert values.size <= 2 * 16384  # no larger than the samples of both ends
    assert_refused(tmp_path / "cut", f"{name} differs")


def test_a_bit_between_the_samples_needs_every_replica(tmp_path):
    config = network(hidden_size=1024, num_layers=1)
    whole = write_whole(tmp_path / "whole.ckpt", config=config, moments=False)
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="dp=2"))
    file = rank_file(without_manifest(tmp_path / "cut"), 1)
    name = "model.tok_embeddings.embedding_weight"
    values = open_tensors(file).read(name)
    data = bytearray(file.read_bytes())
    data[data.find(values.tobytes()) + values.nbytes // 2] ^= 1
    file.write_bytes(data)
    open_source(tmp_path / "cut", strategy=tmp_path / "cut" / "strategy")
    with pytest.raises(UserError, match=f"{name} differs between rank 0 and rank 1"):
        open_source(tmp_path / "cut", strategy=tmp_path / "cut" / "strategy", every_replica=True)


def test_ranks_of_two_checkpoints_mixed(cut, tmp_path):
    without_manifest(cut)
    tensors = {name: (array + 1, dtype) for name, (array, dtype) in whole_tensors().items()}
    other = write_tensors(tmp_path / "other.ckpt", tensors)
    transform(TransformOptions(other, tmp_path / "other", dst_strategy=GRID, format=cut.name))
    shutil.copyfile(rank_file(tmp_path / "other", 4), rank_file(cut, 4))
    shutil.rmtree(tmp_path / "other")
    assert_refused(cut, "differs between rank")


# A strategy that is not the checkpoint's


WRONG = [
    "dp=4,mp=2",
    "mp=8",
    "mp=4,pp=2",
    "dp=2,mp=2,ep=2,pp=2,zero=1",
    "dp=2,mp=2,pp=2",
    "dp=4,ep=2,pp=2",
    "dp=2,mp=2,ep=2,pp=2,vocab_emb_dp=0",
    "dp=4,mp=1,ep=4,pp=2",
]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("grid", WRONG)
def test_wrong_strategy_of_the_same_device_count(cuts, tmp_path, grid, manifest):
    shutil.copytree(cuts / "ckpt", tmp_path / "cut")
    # sizes that every grid divides: a strategy file says nothing of them
    config = network(intermediate_size=64, num_heads=8, n_kv_heads=8)
    other = write_whole(tmp_path / "other.ckpt", config=config)
    transform(TransformOptions(other, tmp_path / "other", dst_strategy=grid))
    if not manifest:
        without_manifest(tmp_path / "cut")
    assert_refused(
        tmp_path / "cut",
        "not this checkpoint's strategy|not the one that this checkpoint was written with",
        src_ckpt_strategy=tmp_path / "other" / "strategy",
    )


def test_replicas_taken_for_different_parts(tmp_path):
    """Shapes alone would allow it: twice as many heads, twice as wide experts, a larger table."""
    whole = write_whole(tmp_path / "whole.ckpt")
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="dp=4,mp=2"))
    without_manifest(tmp_path / "cut")
    config = network(num_heads=8, n_kv_heads=4, intermediate_size=80, vocab_size=128)
    wide = write_whole(tmp_path / "wide.ckpt", config=config)
    transform(TransformOptions(wide, tmp_path / "other", dst_strategy="dp=2,mp=4"))
    assert_refused(
        tmp_path / "cut",
        "not this checkpoint's strategy",
        src_ckpt_strategy=tmp_path / "other" / "strategy",
    )


def test_parameter_absent_from_the_strategy(tmp_path):
    tensors = whole_tensors()
    whole = write_tensors(tmp_path / "whole.ckpt", tensors)
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="mp=2"))
    less = {n: one for n, one in tensors.items() if not n.endswith("lm_head.weight")}
    tied = write_tensors(tmp_path / "less.ckpt", less)
    transform(TransformOptions(tied, tmp_path / "less", dst_strategy="mp=2"))
    without_manifest(tmp_path / "cut")
    strategy = tmp_path / "less" / "strategy"
    assert_refused(
        tmp_path / "cut", "does not name the tensor lm_head.weight", src_ckpt_strategy=strategy
    )
    with pytest.raises(UserError, match="target strategy does not name the tensor lm_head.weight"):
        transform(TransformOptions(whole, tmp_path / "new", dst_ckpt_strategy=strategy))
    full = tmp_path / "cut" / "strategy"
    with pytest.raises(UserError, match="names lm_head.weight, which the checkpoint does not have"):
        transform(TransformOptions(tied, tmp_path / "new", dst_ckpt_strategy=full))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "grid, match",
    [
        (
            "mp=3",
            "--dst_strategy mp=3: .*wq.weight: axis 0 of length 32 .* the 3 parts",
        ),
        ("pp=3", "num_layers 2 is less than .* 3"),
        ("ep=8,dp=8", "length 4 is not divisible by the 8 parts"),
        ("dp=3,ep=2", "data_parallel 3 is not divisible by .*expert_parallel 2"),
    ],
)
def test_impossible_grid(cut, grid, match):
    assert_refused(cut, match, dst_strategy=grid)


def test_strategy_of_another_device_count(cut, tmp_path):
    whole = write_whole(tmp_path / "whole.ckpt")
    transform(TransformOptions(whole, tmp_path / "two", dst_strategy="mp=2"))
    strategy = tmp_path / "two" / "strategy"
    assert_refused(cut, "for 2 devices, .* the files of 8", src_ckpt_strategy=strategy)


# The target


def test_existing_target(cut):
    target = cut.parent / "target"
    write_whole(target / "rank_0/checkpoint_0.ckpt")
    before = folder_hashes(cut.parent)
    with pytest.raises(UserError, match="target is there .* --overwrite"):
        transform(TransformOptions(cut, target))
    (target / "thesis.txt").touch()
    with pytest.raises(UserError, match="thesis.txt, which is no part of a checkpoint"):
        transform(TransformOptions(cut, target, overwrite=True))
    (target / "thesis.txt").unlink()
    assert folder_hashes(cut.parent) == before
    transform(TransformOptions(cut, target, overwrite=True))
    assert verify_checkpoint(target) == []
    assert not [path for path in cut.parent.iterdir() if path.name.startswith(".")]


def test_two_at_once(cut, tmp_path):
    """The second one says so; neither replaces what the other has made."""
    mine, theirs = (TransformOptions(cut, tmp_path / "out", prefix=name) for name in ("a", "b"))
    with (
        new_folder(tmp_path / "out", False, "--dst_ckpt_dir"),
        pytest.raises(BusyError, match="out: wait for its writer"),
    ):
        transform(mine)
    (tmp_path / "out").rmdir()

    def meanwhile(_):
        if not (tmp_path / "out").exists():
            shutil.copytree(cut, tmp_path / "out")
        return lambda _: None

    with pytest.raises(UserError, match="--overwrite"):
        transform(theirs, start_progress=meanwhile)
    assert folder_hashes(tmp_path / "out") == folder_hashes(cut)


@pytest.mark.parametrize("inside", [".", "inner", ".."])
def test_target_and_source_in_each_other(cut, inside):
    before = folder_hashes(cut)
    with pytest.raises(UserError, match="apart from the source"):
        transform(TransformOptions(cut, cut / inside, overwrite=True))
    assert folder_hashes(cut) == before


def test_no_space_is_found_before_anything_is_written(cut, monkeypatch):
    usage = shutil.disk_usage(cut)._replace(free=1 << 20)
    monkeypatch.setattr(reshard.shutil, "disk_usage", lambda _: usage)
    assert_refused(cut, r"it needs [\d,]+ bytes, 1,048,576 are free")


@pytest.mark.slow
def test_disk_that_fills_up_meanwhile(cuts, tmp_path):
    """A real limit of the system on the size of files, in a process of its own."""
    shutil.copytree(cuts / "ckpt", tmp_path / "cut")
    write_whole(tmp_path / "target/rank_0/checkpoint_0.ckpt")
    before = folder_hashes(tmp_path)
    code = (
        "import resource, signal, sys\n"
        "from mixtral_ms.cli.commands.transform import command\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.exit(command())"
    )
    flags = ["--src_ckpt_dir", "cut", "--dst_ckpt_dir", "target", "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot write rank_0/checkpoint_0.ckpt: File too large" in done.stderr
    assert folder_hashes(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


SLOW = """
import sys, time
from mixtral_ms.checkpoint.reshard import rewrite as reshard
from mixtral_ms.cli.commands.transform import command

def slow(path, tensors, on_bytes, write=reshard._write_file):
    print(path, flush=True)
    time.sleep(0.05)
    return write(path, tensors, on_bytes)

reshard._write_file = slow
sys.exit(command())
"""


def start_slow_transform(folder):
    """A process that is in the middle of writing."""
    flags = ["--src_ckpt_dir", "cut", "--dst_ckpt_dir", "target", "--dst_strategy", "mp=4"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags, "--workers", "1"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(2):  # the first file is complete
        process.stdout.readline()
    time.sleep(0.02)
    return process


@pytest.mark.slow
def test_kill_in_the_middle(cuts, tmp_path):
    shutil.copytree(cuts / "ckpt", tmp_path / "cut")
    before = folder_hashes(tmp_path / "cut")
    for _ in range(2):
        process = start_slow_transform(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "target").exists()
        # what the one before has left is gone
        assert len(list(tmp_path.glob(".target.new-*"))) == 1
    transform(TransformOptions(tmp_path / "cut", tmp_path / "target", dst_strategy="mp=4"))
    assert verify_checkpoint(tmp_path / "target") == []
    assert folder_hashes(tmp_path / "cut") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "target"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(cuts, tmp_path):
    shutil.copytree(cuts / "ckpt", tmp_path / "cut")
    process = start_slow_transform(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
