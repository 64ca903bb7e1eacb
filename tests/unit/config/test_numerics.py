"""What shows in no shape but decides what weights compute, key by key."""

import dataclasses

import pytest

from mixtral_ms.config.derived.numerics import numeric_differences
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig

BASE = MixtralConfig(hidden_size=64, num_heads=4, n_kv_heads=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"num_heads": 2, "head_dim": 32, "n_kv_heads": 1},
            ["num_heads", "n_kv_heads", "head_dim"],
        ),
        ({"theta": 1e6}, ["theta"]),
        ({"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"moe_config": MoEConfig(num_experts_chosen=1)}, ["num_experts_chosen"]),
        ({"moe_config": MoEConfig(norm_topk_prob=False)}, ["norm_topk_prob"]),
        ({"seq_length": 128, "compute_dtype": "bfloat16", "top_k": 3, "eos_token_id": 5}, []),
        ({"moe_config": MoEConfig(capacity_factor=2.0, aux_loss_factor=0.1)}, []),
    ],
)
def test_the_keys_that_differ(change, said):
    other = dataclasses.replace(BASE, **change)
    assert [one.key for one in numeric_differences(BASE, other)] == said
    assert not numeric_differences(other, other)


def test_both_values_are_said():
    other = dataclasses.replace(BASE, theta=1e6)
    assert str(*numeric_differences(BASE, other)) == "theta was 10000.0 and is 1000000.0"
