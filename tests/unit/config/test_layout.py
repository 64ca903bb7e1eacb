"""The layout table and the memory plan that reads it."""

import math
from pathlib import Path

import pytest
from helpers.sharded import local_parameter_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_ms.config import MixtralConfig, load_config
from mixtral_ms.config.derived.parameter_table import EMBEDDING, row_of
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid import sharding_rules as layout
from mixtral_ms.parallel.planner.memory_model import (
    dtype_bytes,
    format_bytes,
    format_memory_plan,
    memory_plan,
)

ROOT = Path(__file__).parents[3]
BIG = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
SMALL = {
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 32,
    "intermediate_size": 24,
    "moe_config": {"expert_num": 4},
}


def small(**more):
    return MixtralConfig(**{**SMALL, **more})


def test_mixtral_8x7b_has_its_published_size():
    model = load_config(BIG).model.model_config
    assert layout.parameter_count(model) == 46_702_792_704
    assert layout.active_parameter_count(model) == 12_879_925_248


def test_tiny_model_is_about_forty_million():
    assert layout.parameter_count(load_config(TINY).model.model_config) == 39_201_024


def test_names_and_shapes():
    shapes = layout.parameter_shapes(small(qkv_has_bias=True, attn_proj_has_bias=True))
    prefix = "model.layers.3."
    assert shapes["model.tok_embeddings.embedding_weight"] == (32, 16)
    assert shapes[prefix + "attention.wq.weight"] == (16, 16)
    assert shapes[prefix + "attention.wk.weight"] == (8, 16)
    assert shapes[prefix + "attention.wv.bias"] == (8,)
    assert shapes[prefix + "attention.wo.bias"] == (16,)
    assert shapes[prefix + "feed_forward.routed_experts.router.dense.weight"] == (4, 16)
    assert shapes[prefix + "feed_forward.routed_experts.ffn.w1.weight"] == (4, 24, 16)
    assert shapes[prefix + "feed_forward.routed_experts.ffn.w2.weight"] == (4, 16, 24)
    assert shapes["lm_head.weight"] == (32, 16)
    assert len(shapes) == 1 + 4 * (4 + 4 + 2 + 1 + 3) + 2
    assert "lm_head.weight" not in layout.parameter_shapes(small(tie_word_embeddings=True))


def test_head_dim_of_its_own():
    shapes = layout.parameter_shapes(small(head_dim=6))
    assert shapes["model.layers.0.attention.wq.weight"] == (24, 16)
    assert shapes["model.layers.0.attention.wo.weight"] == (16, 24)


def test_an_unknown_parameter_has_no_rule():
    with pytest.raises(UserError, match=r"model\.layers\.0\.attention\.wz"):
        row_of("model.layers.0.attention.wz.weight")


def test_local_shapes_of_each_kind():
    grid = ParallelConfig(data_parallel=2, model_parallel=2, expert_parallel=2)
    local = local_parameter_shapes(small(), grid, 0)
    layer = "model.layers.0."
    assert local["model.tok_embeddings.embedding_weight"] == (32, 16)  # vocab_emb_dp
    assert local["lm_head.weight"] == (16, 16)
    assert local[layer + "attention.wk.weight"] == (4, 16)
    assert local[layer + "attention.wo.weight"] == (16, 8)
    assert local[layer + "feed_forward.routed_experts.ffn.w1.weight"] == (2, 12, 16)
    assert local[layer + "feed_forward.routed_experts.ffn.w2.weight"] == (2, 16, 12)
    assert local[layer + "attention_norm.weight"] == (16,)
    grid.vocab_emb_dp = False
    assert local_parameter_shapes(small(), grid, 0)[EMBEDDING.name] == (16, 16)
    grid.model_parallel = 3
    with pytest.raises(UserError, match="model_parallel 3"):
        local_parameter_shapes(small(), grid, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_parts_add_up_to_the_whole(tensor, experts, stages, tied):
    """Every value lives on one rank of its groups, or on all where its axis is whole."""
    model = small(n_kv_heads=4, num_layers=6, tie_word_embeddings=tied)
    grid = ParallelConfig(experts, tensor, experts, stages, vocab_emb_dp=False)
    seen: dict[str, int] = {}
    for stage in range(stages):
        for name, shape in local_parameter_shapes(model, grid, stage).items():
            row = row_of(name)
            copies = (tensor if row.tensor_axis is not None else 1) * (
                experts if row.expert_axis is not None else 1
            )
            seen[name] = seen.get(name, 0) + math.prod(shape) * copies
    twice = EMBEDDING.name if tied and stages > 1 else None
    for name, shape in layout.parameter_shapes(model).items():
        assert seen.pop(name) == math.prod(shape) * (2 if name == twice else 1)
    assert not seen


def test_stages():
    assert layers_per_stage(small(), 2) == [2, 2]
    assert layers_per_stage(small(offset=[0, 0, 1]), 3) == [1, 1, 2]
    assert layout.stages_of("model.layers.2.ffn_norm.weight", small(offset=[1, -1]), 2) == (0,)
    assert layout.stages_of("lm_head.weight", small(), 2) == (1,)
    with pytest.raises(UserError, match="only 4 layers"):
        layout.stages_of("model.layers.9.ffn_norm.weight", small(), 2)


def test_memory_of_one_rank_counts_every_parameter():
    (rank,) = memory_plan(load_config(TINY))
    count = 39_201_024
    assert (rank.parameters, rank.gradients) == (4 * count, 4 * count)
    assert rank.optimizer == 8 * count  # two float32 moments
    assert rank.total == sum((rank.parameters, rank.gradients, rank.optimizer, rank.activations))


def test_memory_follows_what_saves_it():
    def plan(*overrides):
        # of the last stage: one before it keeps its layers' inputs in any case
        return memory_plan(load_config(BIG, overrides))[-1]

    base = plan()
    assert plan("recompute_config.recompute=False").activations > 3 * base.activations
    assert plan("parallel.enable_parallel_optimizer=False").optimizer > base.optimizer
    dropless = ("moe_config.capacity_factor=-1", "recompute_config.recompute=False")
    roomy = ("moe_config.capacity_factor=4", "recompute_config.recompute=False")
    alone = "parallel_config.expert_parallel=1"
    assert plan(*roomy, alone).activations > plan(*dropless, alone).activations
    # the experts of one of 8 ranks may get the rows of all
    assert plan(*dropless).activations > plan(*roomy).activations == plan(*roomy, alone).activations
    predict = plan("run_mode=predict")
    assert predict.gradients == predict.optimizer == 0
    key_value_cache = 16 * 2 * 1024 * 4096 * 2  # layers, K and V, width, tokens, bytes
    assert predict.activations == key_value_cache + 4 * 32000
    assert base.ranks == 8


def test_cpu_keeps_bfloat16_as_float32():
    assert dtype_bytes("bfloat16", "CPU") == 4
    assert dtype_bytes("bfloat16", "Ascend") == dtype_bytes("float16", "CPU") == 2


def test_memory_table():
    lines = format_memory_plan(memory_plan(load_config(BIG))).splitlines()
    columns = ["parameters", "gradients", "optimizer", "activations", "total"]
    assert lines[0].split() == ["stage", "ranks", *columns]
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert [format_bytes(size) for size in (12, 2048, 3 << 30, 5 << 40)] == [
        "12 B",
        "2.0 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
