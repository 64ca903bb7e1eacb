"""Whose gradients are added, which part an optimizer has, and what counts in the norm."""

import dataclasses
import math

import numpy as np
import pytest
from helpers.tiny import tiny_config
from mindspore import Parameter, Tensor

from mixtral_ms.config.derived.parameter_table import EMBEDDING
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.parallel.comm.gradient_buckets import GradientReduction
from mixtral_ms.parallel.comm.gradient_reduction import gradient_rules, shard_groups
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import (
    adapter_shapes,
    local_shape,
    parameter_shapes,
    placements,
    stages_of,
)
from mixtral_ms.train.step.adamw import AdamW

MODEL = tiny_config(
    hidden_size=32,
    intermediate_size=32,
    n_kv_heads=4,
    vocab_size=64,
    tie_word_embeddings=True,
    attn_proj_has_bias=True,
    moe_config={"expert_num": 4},
    pet_config={"lora_rank": 4, "target_modules": ".*(wq|wo|w1|w2)"},
)
GRIDS = (
    "dp=1",
    "dp=4",
    "mp=4",
    "dp=2,mp=2",
    "dp=2,ep=2,mp=2,pp=2",
    "dp=2,mp=2,ep=4",
    "mp=4,ep=2",
    "dp=2,cp=2,mp=2,ep=2",
    "dp=4,ep=2,vocab_emb_dp=0,mp=2",
)
LAYER = "model.layers.1."
EXPERTS = LAYER + "feed_forward.routed_experts.ffn."


def names_on(stage, grid):
    shapes = parameter_shapes(MODEL) | adapter_shapes(MODEL)
    here = {n: s for n, s in shapes.items() if stage in stages_of(n, MODEL, grid.pipeline_stage)}
    return shapes, here


def ranks_of(grid):
    return [Mesh(grid, rank) for rank in range(Mesh(grid).world_size)]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("text", GRIDS)
def test_each_value_counts_once_and_each_shard_is_where_the_layout_says(text, zero):
    grid = parse_grid(text)[0]
    shapes, _ = names_on(0, grid)
    counted = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for mesh in ranks_of(grid):
        here = names_on(mesh.stage, grid)[1]
        rules = gradient_rules(MODEL, mesh, here, zero=zero)
        moments = placements(MODEL, grid, ["adam_m." + name for name in here], zero=zero)
        for name, shape in here.items():
            rule, placement = rules[name], moments["adam_m." + name][mesh.stage]
            region = placement.region(shape, mesh.rank)
            counted[name][region] += rule.counted
            if rule.shard is not None:
                rows = local_shape(name, shape, grid)[0] // rule.shard.size
                whole = placement.replicas_of(mesh.rank)
                assert rule.shard.ranks == whole
                first = placement.region(shape, whole[0])[0].start
                assert region[0].start - first == rule.shard.index * rows
                assert region[0].stop - region[0].start == rows
    for name, count in counted.items():
        assert (count == 1).all(), name


BUCKET = 3000


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("text", GRIDS)
def test_ranks_that_add_fill_the_same_buckets(text, zero):
    """Each rank of a group sends it the same gradients in the same order, or all wait for ever."""
    grid, sent, shared = parse_grid(text)[0], {}, 0
    for mesh in ranks_of(grid):
        here = names_on(mesh.stage, grid)[1]
        rules = gradient_rules(MODEL, mesh, here, zero=zero)
        shapes = [local_shape(name, shape, grid) for name, shape in here.items()]
        names, found = list(here), GradientReduction(list(rules.values()), BUCKET)
        buckets = list(found.buckets(shapes))
        assert sorted(n for one in buckets for n in one.numbers) == list(range(len(names)))
        shared += sum(len(one.numbers) > 1 for one in buckets)
        for bucket in buckets:
            assert bucket.bytes <= BUCKET or len(bucket.numbers) == 1
            members = [names[number] for number in bucket.numbers]
            for group in bucket.rule.groups:
                sent.setdefault((group.ranks, mesh.rank), []).append(members)
    assert shared or mesh.world_size == 1
    for (ranks, rank), messages in sent.items():
        assert messages == sent[ranks, ranks[0]], (ranks, rank)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("zero", [False, True])
def test_a_bucket_gives_each_gradient_what_it_gets_by_itself(zero):
    """On a rank without the others a sum is what it is of; what is cut is cut."""
    grid = ParallelConfig(data_parallel=4)
    shapes = names_on(0, grid)[1]
    rules = list(gradient_rules(MODEL, Mesh(grid, 2), shapes, zero=zero).values())
    draw = np.random.default_rng(0).standard_normal
    values = [draw(shape).astype(np.float32) for shape in shapes.values()]

    def reduced(bucket_bytes):
        given = [Tensor(value) for value in values]
        given[1::2] = [Parameter(Tensor(value)) for value in values[1::2]]  # as sums are
        return given[1::2], GradientReduction(rules, bucket_bytes)(list(given))

    _, expected = reduced(0)
    sums, got = reduced(BUCKET)
    for name, one, other in zip(shapes, got, expected, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=name)
    stayed = [one is own for one, own in zip(got[1::2], sums, strict=True)]
    assert all(stayed) if not zero else not any(stayed)


def summed(name, rank, **grid):
    mesh = Mesh(ParallelConfig(**grid), rank)
    return [group.ranks for group in gradient_rules(MODEL, mesh, [name], zero=False)[name].groups]


def test_which_ranks_are_added():
    """dp 2, mp 2: ranks 0 and 1 see the same tokens."""
    plain = {"data_parallel": 2, "model_parallel": 2}
    split = {**plain, "use_seq_parallel": True}
    expected = {
        "attention.wq.weight": ([(0, 2)], [(0, 2)]),
        "attention_norm.weight": ([(0, 2)], [(0, 1, 2, 3)]),
        "attention.wo.bias": ([(0, 2)], [(0, 1, 2, 3)]),
        "feed_forward.routed_experts.router.dense.weight": ([(0, 2)], [(0, 2)]),
        "feed_forward.routed_experts.ffn.w1.weight": ([(0, 2)], [(0, 2)]),
        "attention.wq.lora_a": ([(0, 1, 2, 3)], [(0, 1, 2, 3)]),
        "attention.wq.lora_b": ([(0, 2)], [(0, 2)]),
        "attention.wo.lora_b": ([(0, 1, 2, 3)], [(0, 1, 2, 3)]),
        "feed_forward.routed_experts.ffn.w2.lora_b": ([(0, 1, 2, 3)], [(0, 1, 2, 3)]),
    }
    for name, (without, with_split) in expected.items():
        assert summed(LAYER + name, 0, **plain) == without, name
        assert summed(LAYER + name, 0, **split) == with_split, name
    assert summed("model.norm_out.weight", 0, **split) == [(0, 1, 2, 3)]


def test_experts_are_added_over_their_copies():
    assert summed(EXPERTS + "w1.weight", 1, data_parallel=4, expert_parallel=2) == [(1, 3)]
    assert summed(EXPERTS + "w1.weight", 1, data_parallel=2, expert_parallel=2) == [(1,)]
    over_tensor = {"model_parallel": 4, "expert_parallel": 2}
    assert summed(EXPERTS + "w1.lora_a", 0, **over_tensor) == [(0, 1)]
    assert summed(EXPERTS + "w1.lora_b", 0, **over_tensor) == [(0,)]


def test_a_tied_embedding_is_added_over_both_ends_of_the_pipeline():
    grid = {"data_parallel": 2, "pipeline_stage": 2}
    assert summed(EMBEDDING.name, 1, **grid) == [(0, 1), (1, 3)]
    assert summed(EMBEDDING.name, 2, **grid) == [(2, 3), (0, 2)]


def test_zero_leaves_each_replica_its_share_of_the_moments():
    grid = ParallelConfig(data_parallel=4)
    shapes, _ = names_on(0, grid)
    sizes = []
    for mesh in ranks_of(grid):
        shards = shard_groups(MODEL, mesh, shapes)
        optimizer = AdamW(
            [Parameter(Tensor(np.zeros(s, np.float32)), name=n) for n, s in shapes.items()],
            shards=shards,
        )
        sizes.append(sum(value.size for value in optimizer.state_tensors().values()))
    total = 2 * sum(map(math.prod, shapes.values()))
    uncut = [name for name in shapes if name not in shards]
    assert sizes == [total // 4] * 4, uncut
    assert shard_groups(MODEL, Mesh(dataclasses.replace(grid, data_parallel=1)), shapes) == {}
