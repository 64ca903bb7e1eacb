"""Where tensors are: parts tile the tensor, literal cases, the table's placements for a grid."""

import math
from collections import Counter

import numpy as np
import pytest
from helpers.sharded import local_parameter_shapes
from helpers.tiny import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.config.derived.parameter_table import EMBEDDING
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid import sharding_rules as layout
from mixtral_ms.parallel.grid.placement import Placement

SIZES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3).map(tuple)


@st.composite
def placed_shapes(draw):
    """A placement and the shape of a tensor that fits it."""
    matrix = draw(SIZES)
    free, tensor_map = list(range(len(matrix))), []
    for _ in range(draw(st.integers(1, 3))):
        axes = draw(st.lists(st.sampled_from(free), unique=True, max_size=2)) if free else []
        free = [axis for axis in free if axis not in axes]
        tensor_map.append(tuple(axes))
    size = draw(st.sampled_from([0, -1]))
    placement = Placement(matrix, tuple(tensor_map), size, abs(size), draw(st.integers(0, 9)))
    local = [draw(st.integers(1, 2)) for _ in tensor_map]
    return placement, placement.global_shape(tuple(local))


def regions_of(placement, shape):
    found = (placement.region(shape, rank) for rank in placement.ranks)
    return [tuple((one.start, one.stop) for one in region) for region in found]


@given(placed_shapes())
def test_parts_tile_the_tensor(placed):
    placement, shape = placed
    regions, held = regions_of(placement, shape), np.zeros(shape, int)
    for region in set(regions):
        held[tuple(slice(*ends) for ends in region)] += 1
    assert (held == 1).all()
    assert set(Counter(regions).values()) == {placement.replicas // placement.shards}


@given(placed_shapes())
def test_every_part_has_the_local_shape(placed):
    placement, shape = placed
    local = placement.local_shape(shape)
    assert placement.global_shape(local) == shape
    for region in regions_of(placement, shape):
        assert tuple(stop - start for start, stop in region) == local


@given(placed_shapes())
def test_the_optimizer_shard_only_cuts_parts_further(placed):
    placement, shape = placed
    whole = Placement(placement.dev_matrix, placement.tensor_map, 0, 0, placement.first_rank)
    for inner, outer in zip(regions_of(placement, shape), regions_of(whole, shape), strict=True):
        assert inner[1:] == outer[1:]
        assert outer[0][0] <= inner[0][0] < inner[0][1] <= outer[0][1]


@pytest.mark.parametrize(
    ("placement", "starts"),
    [
        (Placement((2, 2), ((0,),)), [0, 4, 0, 4]),
        (Placement((2, 2), ((1,),)), [0, 0, 4, 4]),
        (Placement((2, 2), ((1, 0),)), [0, 2, 4, 6]),
        (Placement((2, 2), ((0, 1),)), [0, 4, 2, 6]),
        (Placement((2, 2), ((0,),), -1, 2), [0, 4, 2, 6]),
        (Placement((2, 2), ((1,),), -1, 1), [0, 2, 4, 6]),
        (Placement((2, 2), ((),), -1, 1), [0, 2, 4, 6]),
        (Placement((2, 2), ((),), 2, 1), [0, 4, 0, 4]),
        (Placement((4, 2), ((0,),), 2, 2), [0, 4, 2, 6, 0, 4, 2, 6]),
    ],
)
def test_first_row_of_each_rank(placement, starts):
    assert [region[0][0] for region in regions_of(placement, (8,))] == starts


def test_a_scalar_is_whole_everywhere():
    scalar = Placement((2,), (), -1, 1, first_rank=4)
    assert (scalar.local_shape(()), scalar.region((), 5), scalar.ranks) == ((), (), range(4, 6))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Placement((2, 2), ((2,),)), ("[[2]]", "2 axes", "[2, 2]")),
        (lambda: Placement((2, 2), ((0,), (0,))), ("[[0], [0]]", "at most once")),
        (lambda: Placement((0,), ()), ("[0]", "at least 1")),
        (lambda: Placement((2, 3), ((), ()), 2, 1), ("opt_weight_shard_size 2", "6 replicas")),
        (lambda: Placement((4,), ((),), -2, 1), ("opt_weight_shard_size -2", "4 replicas")),
        (lambda: Placement((4,), ((),), 8, 1), ("opt_weight_shard_size 8", "4 replicas")),
        (lambda: Placement((4,), ((0,),)).local_shape((6,)), ("length 6", "4 parts")),
        (lambda: Placement((4,), ((),), -1, 1).local_shape((6,)), ("length 6", "4 parts")),
        (lambda: Placement((4,), ((0,),)).local_shape((4, 4)), ("2 axes", "has 1")),
        (lambda: Placement((4,), ((0,),)).global_shape(()), ("0 axes", "has 1")),
        (lambda: Placement((4,), ((0,),), 0, 0, 4).region((4,), 3), ("rank 3", "4 … 7")),
    ],
)
def test_what_cannot_be_is_refused(make, parts):
    with pytest.raises(UserError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


MODEL = tiny_config(
    hidden_size=16, intermediate_size=32, n_kv_heads=4, vocab_size=32, tie_word_embeddings=True
)
LAYER = "model.layers.1."
W1 = LAYER + "feed_forward.routed_experts.ffn.w1.weight"


def placement_of(name, *, zero=False, **grid):
    return layout.placements(MODEL, ParallelConfig(**grid), [name], zero=zero)[name]


def test_the_table_in_ranks():
    grid = {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "expert_parallel": 2}
    assert {s: p.first_rank for s, p in placement_of(EMBEDDING.name, **grid).items()} == {
        0: 0,
        1: 4,
    }
    assert placement_of(LAYER + "attention.wo.weight", **grid) == {
        1: Placement((2, 2), ((), (0,)), first_rank=4)
    }
    (experts,) = placement_of(W1, **grid).values()
    starts = [region[0][0] for region in regions_of(experts, (4, 32, 16))]
    widths = [region[1] for region in regions_of(experts, (4, 32, 16))]
    assert starts == [0, 0, 2, 2]
    assert widths == [(0, 16), (16, 32)] * 2


def test_expert_copies_are_the_major_ranks():
    (experts,) = placement_of(W1, data_parallel=4, expert_parallel=2).values()
    assert [region[0] for region in regions_of(experts, (4, 32, 16))] == [(0, 2), (2, 4)] * 2


def test_more_expert_ranks_than_data_ranks():
    """dp 2, mp 4, ep 4: two of the four tensor ranks hold other experts, two halves of them."""
    (experts,) = placement_of(W1, data_parallel=2, model_parallel=4, expert_parallel=4).values()
    regions = regions_of(experts, (4, 32, 16))
    assert [region[0][0] for region in regions] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [region[1] for region in regions] == [(0, 16), (16, 32)] * 4
    grid = ParallelConfig(model_parallel=4, expert_parallel=4)
    assert layout.local_shape(W1, (4, 32, 16), grid) == (1, 32, 16)


def test_zero_cuts_moments_where_they_divide():
    grid = {"data_parallel": 2, "model_parallel": 2, "zero": True}
    wk, norm = LAYER + "attention.wk.weight", LAYER + "ffn_norm.weight"
    assert placement_of(wk, **grid)[0].shards == 1
    assert placement_of("adam_m." + wk, **grid)[0] == Placement((2, 2), ((0,), ()), -1, 2)
    assert placement_of("adam_v." + norm, **grid)[0] == Placement((2, 2), ((),), -1, 1)
    assert placement_of("adam_m." + norm, **{**grid, "zero": False})[0] == Placement((2, 2), ((),))
    router = LAYER + "feed_forward.routed_experts.router.dense.weight"  # 4 experts, 8 ranks
    assert placement_of("adam_m." + router, data_parallel=8, zero=True)[0].shards == 1


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
)
def test_every_placement_of_a_grid_has_its_ranks_and_local_shape(dp, mp, ep, pp, zero, whole):
    if ep > dp * mp:
        return
    grid = ParallelConfig(dp, mp, ep, pp, vocab_emb_dp=whole)
    shapes = layout.parameter_shapes(MODEL)
    names = [prefix + name for prefix in ("", *layout.MOMENTS) for name in shapes]
    placed = layout.placements(MODEL, grid, names, zero=zero)
    for stage in range(pp):
        local = local_parameter_shapes(MODEL, grid, stage)
        for name, stages in placed.items():
            parameter = layout.parameter_of(name)
            assert (stage in stages) == (parameter in local)
            if stage in stages:
                part = stages[stage].local_shape(shapes[parameter])
                assert stages[stage].ranks == range(stage * dp * mp, (stage + 1) * dp * mp)
                shards = stages[stage].shards
                assert math.prod(part) * shards == math.prod(local[parameter])
                assert shards == 1 or (zero and name != parameter)


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ({"data_parallel": 4, "expert_parallel": 3}, ("data_parallel 4", "expert_parallel 3")),
        ({"data_parallel": 2, "expert_parallel": 3}, ("expert_parallel 3", "data_parallel 2")),
        ({"model_parallel": 3, "expert_parallel": 2}, ("expert_parallel 2", "model_parallel 3")),
        ({"context_parallel": 4, "expert_parallel": 3}, ("data_parallel 1 * context_parallel 4",)),
    ],
)
def test_expert_ranks_that_do_not_divide(grid, parts):
    with pytest.raises(UserError) as error:
        placement_of(W1, **grid)
    for part in parts:
        assert part in str(error.value)


def test_errors_of_the_table_name_the_tensor():
    with pytest.raises(UserError, match=r"w1\.weight: axis 0 of length 4 .* the 8 parts"):
        placement_of(W1, data_parallel=8, expert_parallel=8)
    with pytest.raises(UserError, match=r"adam_m\.nothing"):
        placement_of("adam_m.nothing")
