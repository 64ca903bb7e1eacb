"""Checkpoints under kill -9, full disks and damaged files."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mixtral_ms
from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.store import multi_rank_save as rank_parts
from mixtral_ms.checkpoint.store import store
from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint
from mixtral_ms.checkpoint.store.store import (
    CheckpointError,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from mixtral_ms.errors import UserError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mixtral_ms.__file__).parents[1])}
SAVE_FOREVER = """
import itertools, sys
import numpy as np
from mixtral_ms.checkpoint.store.async_writer import CheckpointWriter
root, first, same_name, asynchronous = sys.argv[1], *map(int, sys.argv[2:])
writer = CheckpointWriter(root, 2, bool(asynchronous))
for step in itertools.count(first):
    arrays = {f"w{i}": np.full(20_000, step, np.float32) for i in range(5)}
    name = "only" if same_name else f"m-step_{step:07d}"
    writer.save(name, {"model": arrays, "optimizer": arrays}, {"step": step})
    print(step, flush=True)
"""


def start_saving(root, first, same_name, asynchronous):
    arguments = [str(root), str(first), str(int(same_name)), str(int(asynchronous))]
    return subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("same_name", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path, same_name, asynchronous):
    moments = random.Random(f"{same_name}{asynchronous}")
    saved = 0
    for _ in range(6):
        process = start_saving(tmp_path, saved + 1, same_name, asynchronous)
        # a background save is only certain once the next one has been accepted
        for _ in range(1 + asynchronous):
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        printed = process.stdout.read().split()
        process.wait()
        at_least = int(printed[-1]) - asynchronous if printed else saved + 1
        checkpoint = load_checkpoint(resolve_checkpoint(tmp_path))
        saved = checkpoint.state["step"]
        assert saved >= at_least
        for group in checkpoint.tensors.values():
            assert all((array == saved).all() for array in group.values())
        assert all(verify_checkpoint(path) == [] for path in list_checkpoints(tmp_path))
    save_checkpoint(tmp_path, "only" if same_name else "m-step_9999999", {}, {"step": 9999999})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [".lock"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two checkpoints; the tests damage copies of the second."""
    root = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        group = {f"w{i}": np.random.default_rng(i).random((8, 16), np.float32) for i in range(3)}
        save_checkpoint(
            root, f"m-step_{step:07d}", {"model": group, "optimizer": group}, {"step": step}
        )
    return root


@pytest.fixture
def damaged(whole, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    return root / "m-step_0000002"


FILES = [
    "state.json",
    "manifest.json",
    "manifest.sha256",
    "rank_0/model.safetensors",
    "rank_0/optimizer.safetensors",
]


# A manifest, or a state, that somebody changed and hashed again.
WRONG_MANIFESTS = {
    "no files": lambda one: one.pop("files"),
    "a list of files": lambda one: one.update(files=[]),
    "a file that is a number": lambda one: one["files"].update(x=3),
    "a tensor without dtype": lambda one: next(
        iter(one["files"]["rank_0/model.safetensors"]["tensors"].values())
    ).pop("dtype"),
    "no version": lambda one: one.pop("format_version"),
    "a version of text": lambda one: one.update(format_version="2"),
    "no world": lambda one: one.pop("world"),
    "a world of true": lambda one: one.update(world=True),
    "a file elsewhere": lambda one: one["files"].update({"../x": {}}),
    "another file elsewhere": lambda one: one["others"].update({"../../etc/hostname": "0"}),
    "an absolute one": lambda one: one["others"].update({"/etc/hostname": "0"}),
    "others of numbers": lambda one: one["others"].update({"strategy/x": 3}),
    "a layout that is a list": lambda one: one.update(layout_sha256=[]),
}
WRONG_STATES = {
    "no step": lambda one: one.pop("step"),
    "a step of text": lambda one: one.update(step="2"),
    "a list for the network": lambda one: one.update(model_config=[]),
    "a loss scale without value": lambda one: one.update(loss_scale={"good_steps": 1}),
    "a base without fingerprint": lambda one: one.update(base={"path": "x"}),
}


def sign(folder, manifest):
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize("change", WRONG_MANIFESTS)
def test_a_signed_manifest_of_another_shape_is_named(damaged, change):
    manifest = json.loads((damaged / "manifest.json").read_text())
    WRONG_MANIFESTS[change](manifest)
    sign(damaged, manifest)
    assert_refused(damaged, "manifest.json")


@pytest.mark.parametrize("change", WRONG_STATES)
def test_a_signed_state_of_another_shape_is_named(damaged, change):
    state = json.loads((damaged / "state.json").read_text())
    WRONG_STATES[change](state)
    (damaged / "state.json").write_text(json.dumps(state))
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["state_sha256"] = hashlib.sha256((damaged / "state.json").read_bytes()).hexdigest()
    sign(damaged, manifest)
    for open_it in (load_checkpoint, open_source):
        with pytest.raises(UserError, match=r"state\.json"):
            open_it(damaged)


def test_only_checkpoints_of_the_same_run_are_offered(whole, tmp_path):
    """A conversion that lies beside a damaged one is of another network."""
    for name in ("mine", "other"):
        shutil.copytree(whole / "m-step_0000001", tmp_path / name)
    (tmp_path / "mine" / "rank_0/model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(tmp_path / "mine")
    assert "other" not in str(caught.value).replace("No other", "")
    shutil.copytree(whole / "m-step_0000001", tmp_path / "n-step_0000003")
    shutil.copytree(whole / "m-step_0000002", tmp_path / "m-step_0000002")
    (tmp_path / "m-step_0000002" / "rank_0/model.safetensors").unlink()
    with pytest.raises(UserError, match="No other whole checkpoint of its series"):
        resolve_checkpoint(tmp_path / "m-step_0000002")


def assert_refused(path, match):
    """Named by verify, load and resolve; resolve offers the one before it."""
    assert any(match in problem for problem in verify_checkpoint(path)), verify_checkpoint(path)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        load_checkpoint(path)
    for given_path in (path, path.parent):
        good = path.parent / "m-step_0000001"
        with pytest.raises(UserError, match=f"damaged.*go on from it: {good}"):
            resolve_checkpoint(given_path)


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_found(damaged, file):
    path = damaged / file
    whole_bytes = path.read_bytes()
    random_bytes = random.Random(file)
    for _ in range(40):
        data = bytearray(whole_bytes)
        data[random_bytes.randrange(len(data))] ^= 1 << random_bytes.randrange(8)
        path.write_bytes(data)
        assert verify_checkpoint(damaged), "a flipped bit was not found"
    assert_refused(damaged, "manifest.json" if "manifest" in file else file)


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_found(damaged, file):
    path = damaged / file
    size = path.stat().st_size
    for length in (size - 1, size // 2, 9, 3, 0):
        os.truncate(path, length)
        assert_refused(damaged, "manifest.json" if "manifest" in file else file)


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_named(damaged, file):
    (damaged / file).unlink()
    assert f"{file} is missing" in verify_checkpoint(damaged)
    with pytest.raises(UserError, match=f"{file} is missing"):
        resolve_checkpoint(damaged)


def test_flipped_bit_names_the_tensor_and_appended_bytes_are_found(damaged):
    path = damaged / "rank_0/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    problems = verify_checkpoint(damaged)
    assert problems == [
        "rank_0/model.safetensors: tensor w2 was changed: its hash is not the manifest's"
    ]
    data[-1] ^= 1
    path.write_bytes(data + b"x")
    assert_refused(damaged, f"has {len(data) + 1} bytes, {len(data)} were saved")


def test_file_of_another_checkpoint_and_surplus_files_are_named(damaged):
    other = {"w0": np.zeros((8, 16), np.float32), "new": np.zeros((99, 99), np.float32)}
    path = save_checkpoint(damaged.parent, "z", {"model": other}, {"step": 0})
    shutil.copy(path / "rank_0/model.safetensors", damaged / "rank_0/model.safetensors")
    shutil.copy(path / "rank_0/model.safetensors", damaged / "rank_0/extra.safetensors")
    assert verify_checkpoint(damaged) == [
        "rank_0/model.safetensors lacks tensor w1, w2",
        "rank_0/model.safetensors also has tensor new",
        "rank_0/extra.safetensors is not in the manifest",
    ]


def test_all_damaged_says_that_no_other_is_whole(damaged):
    for path in list_checkpoints(damaged.parent):
        (path / "rank_0/model.safetensors").unlink()
    with pytest.raises(UserError, match="No other whole checkpoint"):
        resolve_checkpoint(damaged.parent)


SAVE_BEYOND_THE_LIMIT = """
import resource, signal, sys
import numpy as np
from mixtral_ms.checkpoint.store.store import CheckpointError, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {"model": {"w": np.zeros(50_000, np.float32)}}
try:
    save_checkpoint(sys.argv[1], "big", tensors, {"step": 9}, keep_max=1)
except CheckpointError as error:
    print(error)
"""


def test_write_that_fails_half_way_leaves_the_earlier_ones(damaged):
    root = damaged.parent
    before = sorted(root.rglob("*"))
    command = [sys.executable, "-c", SAVE_BEYOND_THE_LIMIT, str(root)]
    result = subprocess.run(
        command, check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert "big: File too large (it needs 1,248,576 bytes" in result.stdout, result
    assert "earlier checkpoints are untouched" in result.stdout
    assert sorted(root.rglob("*")) == before
    assert resolve_checkpoint(root) == damaged


def test_too_little_free_space_is_found_before_anything_is_written(damaged, monkeypatch):
    root = damaged.parent
    usage = shutil.disk_usage(root)._replace(free=1_500_000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(rank_parts, "write_tensor_file", lambda *_: pytest.fail("it was written"))
    with pytest.raises(
        CheckpointError, match=r"not enough free .*needs 3,048,576 bytes, 1,500,000 are free"
    ):
        save_checkpoint(root, "big", {"model": {"w": np.zeros(500_000, np.float32)}}, {"step": 9})
    assert resolve_checkpoint(root) == damaged


def test_full_disk(damaged):
    """A real one: /dev/full answers every write with ENOSPC."""
    root = damaged.parent
    with pytest.MonkeyPatch.context() as patch:
        original = rank_parts.write_tensor_file

        def write_to_full_disk(path, tensors):
            path.symlink_to("/dev/full")
            return original(path, tensors)

        patch.setattr(rank_parts, "write_tensor_file", write_to_full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_checkpoint(root, "m-step_0000002", {"model": {}}, {"step": 9}, keep_max=1)
    assert [path.name for path in list_checkpoints(root)] == ["m-step_0000001", "m-step_0000002"]
    assert resolve_checkpoint(root) == damaged
    assert not list(root.glob(".*.new-*"))
