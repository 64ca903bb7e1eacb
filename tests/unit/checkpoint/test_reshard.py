"""Regions, the parts of ranks put together, and checkpoints cut and merged again."""

import dataclasses
from math import prod

import numpy as np
import pytest
from helpers.sharded import contents, network, whole_tensors, write_tensors, write_whole
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.regions import (
    overlap,
    region_shape,
    relative,
    row_major_blocks,
    whole_region,
)
from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo, TensorSource
from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.reshard.rewrite import outgoing_region
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.checkpoint.shards.assemble import assemble, layout_sha256
from mixtral_ms.checkpoint.shards.rank_files import find_rank_files
from mixtral_ms.checkpoint.store.manifest import read_manifest, verify_checkpoint
from mixtral_ms.checkpoint.store.store import load_checkpoint, save_checkpoint
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Placement

GRIDS = (
    "mp=2",
    "dp=4",
    "pp=2",
    "dp=2,zero=1",
    "mp=4,ep=4",
    "dp=2,mp=2,ep=2,pp=2,zero=1",
    "dp=2,mp=2,vocab_emb_dp=0",
    "dp=4,ep=2,zero=1",
)


class MemorySource(TensorSource):
    """Arrays as a source."""

    def __init__(self, arrays):
        self.path = "memory"
        self.arrays = arrays
        self.infos = {name: TensorInfo(a.shape, a.dtype.name) for name, a in arrays.items()}

    def read(self, name, region=None):
        return self.arrays[name] if region is None else self.arrays[name][region]


# Regions


@st.composite
def region_in(draw, shape):
    cuts = []
    for length in shape:
        start = draw(st.integers(0, length))
        cuts.append(slice(start, draw(st.integers(start, length))))
    return tuple(cuts)


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@given(st.data())
def test_blocks_are_the_region_in_row_major_order(data):
    shape = data.draw(shapes)
    region = data.draw(region_in(shape))
    most = data.draw(st.integers(1, 40))
    array = np.arange(prod(shape)).reshape(shape)
    blocks = list(row_major_blocks(region, most))
    values = [array[block].reshape(-1) for block in blocks]
    assert all(one.size <= most for one in values)
    assert np.concatenate([[], *values]).tolist() == array[region].reshape(-1).tolist()


@pytest.mark.parametrize(
    "shape, most, blocks",
    [((6, 5), 10, 3), ((6, 5), 30, 1), ((6, 5), 4, 12), ((2, 6, 5), 10, 6), ((), 1, 1)],
)
def test_blocks_are_as_large_as_allowed(shape, most, blocks):
    assert len(list(row_major_blocks(whole_region(shape), most))) == blocks


@given(st.data())
def test_overlap_is_what_both_hold(data):
    shape = data.draw(shapes)
    one, two = data.draw(region_in(shape)), data.draw(region_in(shape))
    marks = np.zeros((2, *shape), bool)
    marks[(0, *one)] = marks[(1, *two)] = True
    both, shared = marks.all(0), overlap(one, two)
    if shared is None:
        assert not both.any()
    else:
        seen = np.zeros(shape, bool)
        seen[shared] = True
        assert (seen == both).all()
        inside = np.arange(prod(shape)).reshape(shape)
        assert (inside[one][relative(shared, one)] == inside[shared]).all()


# Parts of ranks


@st.composite
def placements(draw):
    """A placement and a shape that it divides."""
    matrix = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)))
    free = list(range(len(matrix)))
    tensor_map = []
    for _ in range(draw(st.integers(1, 3))):
        axes = draw(st.lists(st.sampled_from(free), max_size=2, unique=True)) if free else []
        free = [axis for axis in free if axis not in axes]
        tensor_map.append(tuple(axes))
    placement = Placement(matrix, tuple(tensor_map))
    if placement.replicas > 1 and draw(st.booleans()):
        placement = dataclasses.replace(placement, opt_shard_size=-1, opt_shard_step=1)
    local = tuple(draw(st.integers(1, 3)) for _ in tensor_map)
    return placement, placement.global_shape(local)


def cut(arrays, strategies):
    world = max(
        placement.ranks.stop for by_stage in strategies.values() for placement in by_stage.values()
    )
    ranks = [{} for _ in range(world)]
    for name, by_stage in strategies.items():
        for placement in by_stage.values():
            for rank in placement.ranks:
                ranks[rank][name] = arrays[name][placement.region(arrays[name].shape, rank)]
    return [MemorySource(one) for one in ranks]


@given(st.data())
def test_parts_put_together_are_the_tensor(data):
    placement, shape = data.draw(placements())
    array = np.random.default_rng(1).standard_normal(shape)
    strategies = {"w": {0: placement}}
    source = assemble("memory", cut({"w": array}, strategies), strategies, every_replica=True)
    assert source.infos["w"].shape == shape
    assert (source.read("w") == array).all()
    region = data.draw(region_in(shape))
    assert (source.read("w", region) == array[region]).all()
    pieces = outgoing_region(source, "w", whole_region(shape)).pieces()
    assert b"".join(np.ascontiguousarray(one).tobytes() for one in pieces) == array.tobytes()


def test_what_one_part_holds_is_a_view():
    array = np.arange(64.0).reshape(8, 8)
    strategies = {"w": {0: Placement((2,), ((0,), ()))}}
    ranks = cut({"w": array}, strategies)
    source = assemble("memory", ranks, strategies)
    rows = source.read("w", (slice(5, 7), slice(0, 8)))
    assert np.shares_memory(rows, ranks[1].arrays["w"])
    assert (rows == array[5:7]).all()


def test_layout_hash_is_of_what_ranks_hold_not_of_how_it_is_said():
    array = np.random.default_rng(0).standard_normal((4, 6))

    def hashed(placement):
        strategies = {"w": {0: placement}}
        source = assemble("memory", cut({"w": array}, strategies), strategies)
        return layout_sha256(source.regions_of_ranks())

    one = hashed(Placement((2, 2), ((0,), ())))
    assert one == hashed(Placement((2, 1, 2), ((0,), (1,))))
    assert one != hashed(Placement((2, 2), ((1,), ())))


# Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp("whole") / "whole.safetensors")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("format_", ["ckpt", "safetensors"])
def test_cut_and_merged_is_the_same(whole, tmp_path, grid, format_):
    cut_, merged = tmp_path / "cut", tmp_path / "merged"
    transform(TransformOptions(whole, cut_, dst_strategy=grid, format=format_))
    transform(TransformOptions(cut_, merged, src_strategy=grid, format="safetensors"))
    assert contents(merged / "rank_0/checkpoint_0.safetensors") == contents(whole)
    assert verify_checkpoint(cut_) == verify_checkpoint(merged) == []
    assert read_manifest(cut_).strategy == grid


@pytest.mark.parametrize("grid", GRIDS)
def test_the_strategy_beside_the_ranks_says_the_same_as_the_grid(whole, tmp_path, grid):
    cut_ = tmp_path / "cut"
    transform(TransformOptions(whole, cut_, dst_strategy=grid))
    by_file = open_source(cut_, strategy=cut_ / "strategy", every_replica=True).tensors
    by_grid = open_source(cut_, grid=grid).tensors
    assert by_file.regions_of_ranks() == by_grid.regions_of_ranks()


def test_optimizer_state_is_cut_and_tensors_live_on_their_stage_only(whole, tmp_path):
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="dp=2,pp=2,zero=1"))
    first, last = (
        open_tensors(tmp_path / f"cut/rank_{rank}/checkpoint_{rank}.safetensors").infos
        for rank in (0, 3)
    )
    layer = "model.layers.{}.attention.wq.weight"
    assert layer.format(0) in first and layer.format(1) not in first
    assert layer.format(1) in last and layer.format(0) not in last
    assert first[layer.format(0)].shape == (32, 24)
    assert first["adam_m." + layer.format(0)].shape == (16, 24)
    assert "global_step" in first and "global_step" in last


def test_tied_embedding_is_on_both_stages(tmp_path):
    config = network(tie_word_embeddings=True)
    whole = write_whole(tmp_path / "whole.ckpt", config=config)
    transform(TransformOptions(whole, tmp_path / "cut", dst_strategy="pp=2"))
    transform(TransformOptions(tmp_path / "cut", tmp_path / "one"))
    assert contents(tmp_path / "one/rank_0/checkpoint_0.ckpt") == contents(whole)


def test_moments_that_a_strategy_does_not_name_are_where_their_parameters_are(tmp_path):
    tensors = whole_tensors()
    whole = write_tensors(tmp_path / "whole.ckpt", tensors)
    weights = {name: one for name, one in tensors.items() if not name.startswith("adam_")}
    transform(
        TransformOptions(
            write_tensors(tmp_path / "weights.ckpt", weights),
            tmp_path / "weights",
            dst_strategy="mp=2",
        )
    )
    strategy = tmp_path / "weights" / "strategy"
    transform(TransformOptions(whole, tmp_path / "cut", dst_ckpt_strategy=strategy))
    (tmp_path / "cut" / "strategy").rename(tmp_path / "aside")
    (tmp_path / "cut" / "manifest.json").unlink()
    source = open_source(tmp_path / "cut", strategy=strategy).tensors
    assert {n: (i.shape, i.dtype, source.read(n).tobytes()) for n, i in source.infos.items()} == (
        contents(whole)
    )


def test_weights_alone_fit_a_strategy_that_names_moments_too(whole, tmp_path):
    transform(TransformOptions(whole, tmp_path / "full", dst_strategy="dp=2,zero=1"))
    weights = write_whole(tmp_path / "weights.ckpt", moments=False)
    strategy = tmp_path / "full" / "strategy"
    transform(TransformOptions(weights, tmp_path / "cut", dst_ckpt_strategy=strategy))
    transform(TransformOptions(tmp_path / "cut", tmp_path / "one", src_ckpt_strategy=strategy))
    assert contents(tmp_path / "one/rank_0/checkpoint_0.ckpt") == contents(weights)


def test_our_own_checkpoint_keeps_its_files_and_its_state(tmp_path):
    tensors = {name: array for name, (array, _) in whole_tensors().items()}
    tensors.pop("global_step")
    groups = {
        "model": {n: a for n, a in tensors.items() if not n.startswith("adam_")},
        "optimizer": {n: a for n, a in tensors.items() if n.startswith("adam_")},
    }
    saved = save_checkpoint(tmp_path / "run", "m-step_0000007", groups, {"step": 7})
    # the folder of checkpoints means its latest
    transform(TransformOptions(tmp_path / "run", tmp_path / "cut", dst_strategy="mp=2,pp=2"))
    files = sorted(p.name for p in (tmp_path / "cut" / "rank_3").iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors"]
    transform(TransformOptions(tmp_path / "cut", tmp_path / "one"))
    loaded = load_checkpoint(tmp_path / "one")
    assert loaded.state == {"step": 7}
    for stem, group in groups.items():
        assert {n: a.tobytes() for n, a in loaded.tensors[stem].items()} == {
            n: a.tobytes() for n, a in group.items()
        }
    assert verify_checkpoint(saved) == []


# Files of ranks


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_newest_checkpoint_of_each_rank(tmp_path):
    for rank in range(11):
        names = ("1_2", "1_10", "2_1") if rank else ("2_1", "1_2")
        touch(tmp_path / f"rank_{rank}", *(f"mixtral_rank_{rank}-{n}.ckpt" for n in names))
        touch(tmp_path / f"rank_{rank}", "meta.json", "llama_rank_0-9_9.ckpt")
    files = find_rank_files(tmp_path, "mixtral_")
    assert [[p.name for p in one] for one in files] == [
        [f"mixtral_rank_{rank}-2_1.ckpt"] for rank in range(11)
    ]


@pytest.mark.parametrize(
    "names, message",
    [
        (["rank_0/a.ckpt", "rank_3/a.ckpt"], "no folder rank_1, rank_2, but one up to rank_3"),
        (["rank_0/a.ckpt", "rank_1/a.txt"], "rank_1 holds no .ckpt or .safetensors"),
        (["other/a.ckpt"], "holds no folder rank_0"),
        (["rank_0/a-1_2.ckpt", "rank_1/a-1_3.ckpt"], "a-1_3.ckpt is of another step than rank 0"),
        (["rank_0/a.ckpt", "rank_0/b.ckpt"], "2 checkpoints, and a.ckpt does not say its step"),
        (["rank_0/a-1_1.ckpt", "rank_0/b-1_1.ckpt"], "several runs: a, b"),
        (["rank_0/a-1_1.ckpt", "rank_0/a-1_1.safetensors"], "in two formats"),
        (
            [
                "rank_0/model.safetensors",
                "rank_0/optimizer.safetensors",
                "rank_1/model.safetensors",
            ],
            "rank_1|rank 1",
        ),
    ],
)
def test_rank_folders_that_are_not_one_checkpoint(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        find_rank_files(tmp_path)


@pytest.mark.parametrize("other", [np.ones(2, np.float32), np.zeros(2, np.int32), np.zeros(3)])
def test_two_files_with_another_tensor_of_one_name_are_refused(tmp_path, other):
    arrays = {"a.ckpt": np.zeros(2, np.float32), "b.ckpt": other}
    files = [
        write_tensors(tmp_path / name, {"w": (array, array.dtype.name)})
        for name, array in arrays.items()
    ]
    with pytest.raises(UserError, match="'w' is in"):
        MergedSource(tmp_path, [open_tensors(file) for file in files])


def test_a_region_of_a_region_has_the_shape_of_what_it_holds():
    region = (slice(2, 5), slice(1, 1))
    assert region_shape(region) == (3, 0)
    assert list(row_major_blocks(region, 4)) == []
