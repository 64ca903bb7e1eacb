"""Saving, listing, pruning, resolving and loading checkpoints."""

import json

import mindspore as ms  # registers numpy's bfloat16
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from mixtral_ms.checkpoint.store.folders import (
    checkpoint_name,
    clean_leftovers,
    list_checkpoints,
    parse_checkpoint_name,
    read_latest,
    restore_moved,
)
from mixtral_ms.checkpoint.store.manifest import _hash_line, verify_checkpoint
from mixtral_ms.checkpoint.store.store import load_checkpoint, resolve_checkpoint, save_checkpoint
from mixtral_ms.errors import UserError

TENSORS = {
    "model": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)},
    "optimizer": {"adam_m.w": np.ones((3, 4), np.float32)},
}


def save(root, step, keep_max=None, prefix="m"):
    name = checkpoint_name(prefix, step)
    return save_checkpoint(root, name, TENSORS, {"step": step}, keep_max=keep_max)


def names(root):
    return [path.name for path in list_checkpoints(root)]


DTYPES = ("float32", "float16", "int64", "int32", "bool", "uint8")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrays=st.lists(
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
        ),
        max_size=6,
    ),
    transpose=st.booleans(),
)
def test_round_trip_is_exact(tmp_path, arrays, transpose):
    arrays = [array.T if transpose else array for array in arrays]
    group = {f"t{index}": array for index, array in enumerate(arrays)}
    path = save_checkpoint(tmp_path, "m", {"model": group}, {"step": 1, "x": 0.1})
    loaded = load_checkpoint(path)
    assert loaded.state == {"step": 1, "x": 0.1}
    assert set(loaded.tensors["model"]) == set(group)
    for name, array in group.items():
        back = loaded.tensors["model"][name]
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        assert back.tobytes() == array.tobytes()


def test_strided_views_are_stored_in_logical_order(tmp_path):
    """safetensors 0.8.0's save_file stores such arrays in memory order, without an error."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {
        "t": base.T,
        "s": base[::2, 1::3],
        "r": base[::-1],
        "b": np.broadcast_to(base[0], (3, 6)),
    }
    path = save_checkpoint(tmp_path, "m", {"model": views}, {"step": 1})
    with safe_open(path / "rank_0/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "ms"}
        for name, view in views.items():
            np.testing.assert_array_equal(file.get_tensor(name), view)


def test_bfloat16_and_mindspore_reads_the_file(tmp_path):
    bf16 = np.linspace(-3, 3, 10, dtype=np.float32).astype("bfloat16").reshape(2, 5)
    group = {"bf": bf16, "f": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    path = save_checkpoint(tmp_path, "m", {"model": group}, {"step": 1})
    back = load_checkpoint(path).tensors["model"]
    assert back.source.infos["bf"].dtype == "bfloat16"
    assert back.source.read("bf").tobytes() == bf16.tobytes()
    assert back["bf"].dtype == np.float32
    np.testing.assert_array_equal(back["bf"], bf16.astype(np.float32))
    read = ms.load_checkpoint(str(path / "rank_0/model.safetensors"), format="safetensors")
    np.testing.assert_array_equal(read["f"].asnumpy(), group["f"])
    np.testing.assert_array_equal(read["bf"].astype(ms.float32).asnumpy(), bf16.astype(np.float32))


@pytest.mark.parametrize("bad", [np.zeros(2, np.complex64), np.zeros(2, ">f4")])
def test_dtype_that_cannot_be_stored_is_refused_by_name(tmp_path, bad):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"tensor 'odd' has dtype .*holds float32"):
        save_checkpoint(tmp_path, "n", {"model": {"odd": bad}}, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "latest", "m-step_0000001"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must be an integer"),
        ({"step": 1, "x": float("nan")}, "not JSON compliant"),
        ({"step": 1, "x": object()}, "must be JSON"),
    ],
)
def test_state_that_cannot_be_stored_is_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, "n", TENSORS, state)
    assert list(tmp_path.iterdir()) == []


def test_names_round_trip():
    assert checkpoint_name("mixtral-8x7b", 42) == "mixtral-8x7b-step_0000042"
    assert parse_checkpoint_name("mixtral-8x7b-step_0000042") == ("mixtral-8x7b", 42)
    assert parse_checkpoint_name(checkpoint_name("a", 12345678)) == ("a", 12345678)
    assert parse_checkpoint_name("model.safetensors") is None


def test_order_is_by_the_states_step_and_latest_is_the_last_saved(tmp_path):
    for name, step in (("c", 30), ("b", 4), ("a", 100), ("d", 9)):
        save_checkpoint(tmp_path, name, TENSORS, {"step": step})
    assert names(tmp_path) == ["b", "d", "c", "a"]
    assert read_latest(tmp_path) == "d"
    assert resolve_checkpoint(tmp_path).name == "d"


def test_a_damaged_state_is_found_and_not_passed_over(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / checkpoint_name("m", 2)
    (newest / "state.json").write_text("{}")
    assert list_checkpoints(tmp_path)[-1] == newest
    assert "state.json was changed" in verify_checkpoint(newest)[0]


def test_keep_max_removes_the_oldest_of_the_same_prefix_only(tmp_path):
    save(tmp_path, 1, prefix="other")
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_max=2)
    assert names(tmp_path) == ["other-step_0000001", "m-step_0000003", "m-step_0000004"]


def test_keep_max_never_removes_the_one_just_saved(tmp_path):
    """A run resumed from an old step saves below the steps of the run that was abandoned."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep_max=1)
    assert names(tmp_path) == ["m-step_0000015"]
    assert resolve_checkpoint(tmp_path).name == "m-step_0000015"


@pytest.mark.parametrize("keep_max", [0, -1])
def test_keep_max_below_one_is_refused(tmp_path, keep_max):
    with pytest.raises(ValueError, match=f"keep_max is {keep_max}"):
        save(tmp_path, 1, keep_max=keep_max)


def test_same_name_is_replaced(tmp_path):
    save(tmp_path, 1)
    tensors = {"model": {"w": np.zeros(2, np.float32)}}
    path = save_checkpoint(tmp_path, "m-step_0000001", tensors, {"step": 1, "new": True})
    assert load_checkpoint(path).state == {"step": 1, "new": True}
    assert set(load_checkpoint(path).tensors) == {"model"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "latest", path.name]


def test_checkpoint_moved_aside_by_a_dead_process_is_found_again(tmp_path):
    path = save(tmp_path, 7)
    moved = tmp_path / ".m-step_0000007.old-0123abcd"
    path.rename(moved)
    assert resolve_checkpoint(tmp_path) == path
    path.rename(moved)
    assert resolve_checkpoint(path) == path
    path.rename(moved)
    assert names(tmp_path) == []
    restore_moved(tmp_path)
    assert verify_checkpoint(path) == []


def test_leftovers_go_with_the_next_save_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    for name in (".m.new-0123abcd", ".m.gone-0123abcd", ".m-step_0000001.old-0123abcd"):
        (tmp_path / name / "rank_0").mkdir(parents=True)
    (tmp_path / ".latest.0123abcd.tmp").touch()
    (tmp_path / ".mine.new-notours").mkdir()
    (tmp_path / "notes.txt").touch()
    clean_leftovers(tmp_path)
    kept = {".lock", ".mine.new-notours", "notes.txt", "latest", "m-step_0000001"}
    assert {p.name for p in tmp_path.iterdir()} == kept
    assert verify_checkpoint(tmp_path / "m-step_0000001") == []


def test_resolve_takes_a_folder_a_root_or_a_name(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert resolve_checkpoint(first) == first
    assert resolve_checkpoint(tmp_path) == second
    assert resolve_checkpoint(tmp_path, first.name) == first
    (tmp_path / "latest").unlink()
    assert resolve_checkpoint(tmp_path) == second


def test_resolve_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"--load_checkpoint: the folder .*nowhere does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    with pytest.raises(
        UserError, match=rf"no checkpoint 'x'; it holds {path.name}\. The newest good"
    ):
        resolve_checkpoint(tmp_path, "x")
    (tmp_path / "latest").write_text("gone\n")
    with pytest.raises(UserError, match=rf"no checkpoint .gone..*go on from it: {path}"):
        resolve_checkpoint(tmp_path)


def test_resolving_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".lock").unlink()
    before = sorted(tmp_path.rglob("*"))
    resolve_checkpoint(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_manifest_of_a_later_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    body = json.loads((path / "manifest.json").read_text()) | {"format_version": 9}
    text = json.dumps(body).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(_hash_line(text))
    with pytest.raises(UserError, match="format_version 9, this version of mixtral-ms reads 2"):
        load_checkpoint(path)
