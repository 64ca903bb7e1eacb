"""A conversion that stops in the middle: nothing half done is seen, and a rerun goes on."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.convert_oracle import MAKERS, assert_same, tensors_in, write_source

from mixtral_ms.convert.formats.found_weights import find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.job import execute as execute_module
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.convert.job.execute import ConversionError
from mixtral_ms.convert.job.workspace import open_workspace
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[3]
SLOW = """
import sys, time
from pathlib import Path
from mixtral_ms.convert.job import execute
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
pieces = execute.stored_pieces
def slow(*args, **kwargs):
    time.sleep(0.02)
    yield from pieces(*args, **kwargs)
execute.stored_pieces = slow
options = ConvertOptions(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], max_shard_bytes=4000)
convert(prepare(options))
"""


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "in", "hf")
    return tmp_path / "in"


def options_for(source, **more):
    defaults = {"max_shard_bytes": 4000, "workers": 1}
    return ConvertOptions(source, source.parent / "out", "hf", **{**defaults, **more})


def workspace_of(source):
    return source.parent / ".out.converting"


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_killed_and_resumed(tmp_path):
    weights = write_source(tmp_path / "in", "ours")
    command = [sys.executable, "-c", SLOW, tmp_path / "in", tmp_path / "out", "hf"]
    process = subprocess.Popen(command, cwd=ROOT)
    done = workspace_of(tmp_path / "in") / "done"
    try:
        wait_for(lambda: done.is_dir() and len(list(done.glob("[!.]*.json"))) >= 2)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    outcome = convert(prepare(options_for(tmp_path / "in"))).outcome
    assert outcome.resumed >= 2
    assert len(outcome.files) > outcome.resumed
    assert_same(tensors_in(tmp_path / "out"), MAKERS["hf"](weights))
    assert not workspace_of(tmp_path / "in").exists()


class _KilledError(Exception):
    pass


def stop_after(monkeypatch, count):
    """Let the conversion fail after `count` atoms."""
    left = iter(range(count))
    pieces = execute_module.stored_pieces

    def failing(*args, **kwargs):
        if next(left, None) is None:
            raise _KilledError
        return pieces(*args, **kwargs)

    monkeypatch.setattr(execute_module, "stored_pieces", failing)
    return lambda: monkeypatch.setattr(execute_module, "stored_pieces", pieces)


def interrupted(source, monkeypatch, **more):
    restore = stop_after(monkeypatch, 25)
    with pytest.raises(_KilledError):
        convert(prepare(options_for(source, **more)))
    restore()
    assert not (source.parent / "out").exists()
    assert any((workspace_of(source) / "done").iterdir())


def test_a_finished_file_that_was_damaged_is_written_again(source, monkeypatch):
    interrupted(source, monkeypatch)
    notes = sorted((workspace_of(source) / "done").iterdir())
    file = workspace_of(source) / "output" / notes[0].name.removesuffix(".json")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = convert(prepare(options_for(source))).outcome
    assert outcome.resumed == len(notes) - 1
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    assert_same(tensors_in(source.parent / "out"), weights)


def test_another_plan_starts_anew(source, monkeypatch):
    interrupted(source, monkeypatch)
    assert convert(prepare(options_for(source, dtype="float16"))).outcome.resumed == 0
    got = tensors_in(source.parent / "out")
    assert {value.dtype for value in got.values()} == {np.dtype(np.float16)}


def test_another_input_starts_anew(source, monkeypatch):
    interrupted(source, monkeypatch)
    file = source / "model.safetensors"
    weights = {name: value + 1 for name, value in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(weights, file)
    assert convert(prepare(options_for(source))).outcome.resumed == 0
    assert_same(tensors_in(source.parent / "out"), weights)


def test_losses_are_remembered_over_an_interruption(source, monkeypatch):
    file = source / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["model.embed_tokens.weight"][0, 0] = 1e9
    safetensors.numpy.save_file(weights, file)
    interrupted(source, monkeypatch, dtype="float16")
    outcome = convert(prepare(options_for(source, dtype="float16"))).outcome
    assert outcome.resumed
    assert outcome.losses == {"model.embed_tokens.weight": (1, 0)}


def test_threads_stop_when_one_fails(source, monkeypatch):
    stop_after(monkeypatch, 5)
    with pytest.raises(_KilledError):
        convert(prepare(options_for(source, workers=4)))
    assert not [one for one in threading.enumerate() if one.name.startswith("convert")]


def test_too_little_space_is_seen_before(source, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(execute_module.shutil, "disk_usage", lambda _: usage(10, 9, 1234))
    with pytest.raises(UserError, match=r"needed, 1,234 are free"):
        convert(prepare(options_for(source)))
    assert not (source.parent / "out").exists()
    assert not workspace_of(source).exists()  # nothing is in it that a rerun could use


def test_a_disk_that_fills_up(source):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = options_for(source, max_shard_bytes=10**9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ConversionError, match="make room and run the same command again"):
            convert(prepare(options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (source.parent / "out").exists()
    assert not list((workspace_of(source) / "output").rglob("*.safetensors"))
    convert(prepare(options))
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    assert_same(tensors_in(source.parent / "out"), weights)


def test_a_failed_rename_keeps_what_was_there(source, monkeypatch):
    convert(prepare(options_for(source)))
    first = json.loads((source.parent / "out" / "conversion.json").read_text())
    rename, calls = os.rename, []

    def failing(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="input/output"):
        convert(prepare(options_for(source, overwrite=True, dtype="float16")))
    monkeypatch.undo()
    with pytest.raises(UserError, match="--overwrite"):  # what was moved aside is back
        prepare(options_for(source, dtype="float16"))
    assert json.loads((source.parent / "out" / "conversion.json").read_text()) == first


def test_two_at_once(source):
    with (
        open_workspace(source.parent / "out"),
        pytest.raises(UserError, match="wait for its conversion"),
    ):
        convert(prepare(options_for(source)))


def test_what_another_put_there_meanwhile_is_kept(source, tmp_path):
    """Prepared while nothing was there, and typed without --overwrite."""
    late = prepare(options_for(source))
    convert(prepare(options_for(source, dtype="float16")))
    with pytest.raises(UserError, match="--overwrite"):
        convert(late)
    assert {one.dtype.name for one in tensors_in(source.parent / "out").values()} == {"float16"}


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"entry": {}}', '{"read": {}, "losses": {}}'])
def test_a_damaged_note_costs_a_file_and_nothing_else(source, monkeypatch, damage):
    interrupted(source, monkeypatch)
    for note in (workspace_of(source) / "done").iterdir():
        note.write_text(damage)
    assert convert(prepare(options_for(source))).outcome.resumed == 0
    weights = safetensors.numpy.load_file(source / "model.safetensors")
    assert_same(tensors_in(source.parent / "out"), weights)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_record_and_file(source, monkeypatch, overwrite):
    """Readers refuse what does not belong together, and the same command completes it."""
    output = source.parent / "m.ckpt"
    if overwrite:
        convert(prepare(ConvertOptions(source, output, "ours", dtype="float16")))
    options = ConvertOptions(source, output, "ours", overwrite=overwrite)
    replace = os.replace

    def killed(a, b):
        replace(a, b)
        if Path(b) == output.with_name("m.ckpt.json"):
            raise _KilledError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(_KilledError):
        convert(prepare(options))
    monkeypatch.undo()
    assert output.exists() == overwrite
    if overwrite:
        with pytest.raises(UserError, match="m.ckpt is not what m.ckpt.json"):
            open_found(find_weights(output))
    convert(prepare(options))
    assert open_found(find_weights(output)).infos["lm_head.weight"].dtype == "float32"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "git-lfs"),
        ("tokenizer.model", b"", "empty"),
        ("tokenizer.json", b"<html>", "web page"),
    ],
)
def test_a_tokenizer_that_did_not_come_is_not_copied(source, name, content, said):
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is .*{said}"):
        prepare(options_for(source))
    (source / name).write_bytes(b"\n\x0e\n\x05<unk>")
    prepare(options_for(source))


@pytest.mark.parametrize("target", ["/proc/x/m.ckpt", "/proc/m.ckpt"])
def test_a_place_that_takes_no_files_is_named(source, target):
    with pytest.raises(UserError, match="/proc.*cannot be written"):
        convert(prepare(ConvertOptions(source, Path(target), "ours")))
