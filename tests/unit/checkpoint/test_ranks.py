"""Checkpoints that several ranks write together; here every rank is a thread."""

import shutil
import threading
import time

import numpy as np
import pytest
from helpers.sharded import network, whole_tensors

from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.store.async_writer import CheckpointWriter
from mixtral_ms.checkpoint.store.folders import list_checkpoints, read_latest
from mixtral_ms.checkpoint.store.manifest import read_manifest, verify_checkpoint
from mixtral_ms.checkpoint.store.multi_rank_save import SavingRanks
from mixtral_ms.checkpoint.store.store import CheckpointError, save_checkpoint
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import placements

TENSORS = {name: one[0] for name, one in whole_tensors().items() if name != "global_step"}
GRIDS = ("dp=2", "mp=2", "dp=2,ep=2", "dp=2,zero=1", "pp=2", "dp=2,mp=2,pp=2,ep=2,zero=1")


def ranks_of(text, **options):
    grid, zero = parse_grid(text)
    world = Mesh(grid).world_size
    return [SavingRanks(network(), Mesh(grid, r), zero, "run", **options) for r in range(world)]


def parts_of(ranks, tensors=TENSORS):
    """What a rank gives to `save_checkpoint`."""
    by_name = placements(ranks.network, ranks.mesh.grid, tensors, zero=ranks.zero)
    groups = {"model": {}, "optimizer": {}}
    for name, array in tensors.items():
        if (placement := by_name[name].get(ranks.mesh.stage)) is not None:
            stem = "optimizer" if name.startswith("adam_") else "model"
            groups[stem][name] = array[placement.region(array.shape, ranks.mesh.rank)]
    return groups


def save(root, name, every, step=1, **options):
    """All ranks save at once, the first one last to begin; returns their errors by rank."""
    errors = {}

    def one(ranks):
        try:
            save_checkpoint(root, name, parts_of(ranks), {"step": step}, ranks=ranks, **options)
        except CheckpointError as error:
            errors[ranks.mesh.rank] = str(error)

    threads = [threading.Thread(target=one, args=(ranks,)) for ranks in reversed(every)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("text", GRIDS)
def test_all_parts_are_the_whole(tmp_path, text):
    assert save(tmp_path, "m-step_0000001", ranks_of(text)) == {}
    folder = tmp_path / "m-step_0000001"
    assert verify_checkpoint(folder) == []
    opened = open_source(tmp_path, every_replica=True)
    assert (opened.own_layout, opened.state) == (True, {"step": 1})
    assert set(opened.tensors.infos) == set(TENSORS)
    for name, array in TENSORS.items():
        assert np.array_equal(opened.tensors.read(name), array)
    manifest = read_manifest(folder)
    assert (manifest.world, parse_grid(manifest.strategy)) == (
        len(ranks_of(text)),
        parse_grid(text),
    )
    expected = {*(f"rank_{rank}" for rank in range(manifest.world)), "strategy", "state.json"}
    assert {one.name for one in folder.iterdir()} == {
        *expected,
        "manifest.json",
        "manifest.sha256",
    }


def test_transform_makes_one_rank_of_them(tmp_path):
    save(tmp_path / "many", "m-step_0000001", ranks_of("dp=2,mp=2,zero=1"))
    transform(TransformOptions(tmp_path / "many", tmp_path / "one"))
    save_checkpoint(tmp_path / "alone", "m", parts_of(ranks_of("dp=1")[0]), {"step": 1})
    for stem in ("model", "optimizer"):
        one, alone = (
            open_source(tmp_path / where / f"rank_0/{stem}.safetensors").tensors
            for where in ("one", "alone/m")
        )
        assert set(one.infos) == set(alone.infos)
        assert all(np.array_equal(one.read(name), alone.read(name)) for name in alone.infos)


def test_older_ones_go_and_leftovers_of_a_killed_run_too(tmp_path):
    leftover = tmp_path / ".m-step_0000001.new-00000000"
    (leftover / "rank_0").mkdir(parents=True)
    for step in (1, 2, 3):
        save(tmp_path, f"m-step_000000{step}", ranks_of("dp=2"), step, keep_max=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["m-step_0000002", "m-step_0000003"] and read_latest(tmp_path) == names[-1]
    assert not [path for path in tmp_path.iterdir() if ".new-" in path.name]


def test_a_rank_that_never_comes_is_named(tmp_path):
    every = ranks_of("dp=4", wait_seconds=0.5)
    save(tmp_path, "m-step_0000001", every, 1)
    errors = save(tmp_path, "m-step_0000002", [every[0], every[2]], 2)
    assert set(errors) == {0}
    assert "rank 1, rank 3 have not written their part after 0.5 s" in errors[0]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["m-step_0000001"]
    errors = save(tmp_path, "m-step_0000003", every[3:], 3)
    assert "rank 0 has not made" in errors[3]


def test_a_missing_rank_or_strategy_is_seen(tmp_path):
    save(tmp_path, "m", ranks_of("dp=2,zero=1"))
    shutil.rmtree(tmp_path / "m" / "rank_1")
    problems = verify_checkpoint(tmp_path / "m")
    assert "rank_1/model.safetensors is missing" in problems
    shutil.rmtree(tmp_path / "m" / "strategy")
    problems = verify_checkpoint(tmp_path / "m")
    assert "strategy/ckpt_strategy_rank_0.ckpt is missing" in problems


def test_saving_in_the_background(tmp_path):
    writers = [CheckpointWriter(tmp_path, 1, True, ranks) for ranks in ranks_of("dp=2")]
    for step in (1, 2):
        for writer in reversed(writers):
            writer.save(f"m-step_000000{step}", parts_of(ranks_of("dp=2")[0]), {"step": step})
        time.sleep(0.01)
    for writer in writers:
        writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["m-step_0000002"]
    assert verify_checkpoint(tmp_path / "m-step_0000002") == []


def test_ranks_share_out_the_comparison_with_the_hashes(tmp_path):
    save(tmp_path, "m", ranks_of("dp=2"))
    damaged = [tmp_path / "m" / name for name in ("rank_0/optimizer", "rank_1/model")]
    for path in damaged:
        path.with_suffix(".safetensors").write_bytes(b"")
    shares = [verify_checkpoint(tmp_path / "m", part, 3) for part in range(3)]
    assert sorted(sum(shares, [])) == sorted(verify_checkpoint(tmp_path / "m"))
    assert sum(1 for share in shares if share) == 2
