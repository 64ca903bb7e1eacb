"""Saving in the background: snapshots, order, errors."""

import threading
from contextlib import closing

import numpy as np
import pytest

from mixtral_ms.checkpoint.store import async_writer
from mixtral_ms.checkpoint.store.async_writer import CheckpointWriter
from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.store import CheckpointError, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("asynchronous", [False, True])
def test_arrays_and_state_may_change_as_soon_as_save_returns(tmp_path, asynchronous):
    weight, state = np.zeros((200, 1000), np.float32), {"step": 0, "rng": [0]}
    with closing(CheckpointWriter(tmp_path, None, asynchronous)) as writer:
        for step in range(5):
            weight[:] = step
            state["step"] = state["rng"][0] = step
            writer.save(f"c{step}", {"model": {"w": weight.T}}, state)
            weight[:] = -1
            state["rng"][0] = -1
    for step, path in enumerate(list_checkpoints(tmp_path)):
        checkpoint = load_checkpoint(path)
        assert checkpoint.state == {"step": step, "rng": [step]}
        assert (checkpoint.tensors["model"]["w"] == step).all()
    assert len(list_checkpoints(tmp_path)) == 5


def test_save_returns_before_the_write_ends_and_the_next_one_waits(tmp_path, monkeypatch):
    gate, under_way, most = threading.Event(), [], []

    def slow_save(*args, **kwargs):
        under_way.append(1)
        most.append(len(under_way))
        gate.wait(10)
        path = save_checkpoint(*args, **kwargs)
        under_way.pop()
        return path

    monkeypatch.setattr(async_writer, "save_checkpoint", slow_save)
    writer = CheckpointWriter(tmp_path, None, asynchronous=True)
    writer.save("a", {"model": {}}, {"step": 1})
    assert list_checkpoints(tmp_path) == []
    second = threading.Thread(target=writer.save, args=("b", {"model": {}}, {"step": 2}))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(10)
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["a", "b"]
    assert most == [1, 1]


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_an_error_in_the_background_is_raised_once_by_the_next_call(tmp_path, call):
    root = tmp_path / "root"
    root.write_text("a file where the folder should be")
    writer = CheckpointWriter(root, None, asynchronous=True)
    writer.save("a", {"model": {}}, {"step": 1})
    arguments = ("b", {"model": {}}, {"step": 2}) if call == "save" else ()
    with pytest.raises(CheckpointError, match="cannot save the checkpoint .*earlier checkpoints"):
        getattr(writer, call)(*arguments)
    writer.close()


def test_a_bad_state_is_refused_at_once(tmp_path):
    with (
        closing(CheckpointWriter(tmp_path, None, True)) as writer,
        pytest.raises(ValueError, match="step"),
    ):
        writer.save("a", {"model": {}}, {"step": None})
