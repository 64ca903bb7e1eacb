"""A network small enough for any test."""

import numpy as np

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig


def tiny_config(**changes) -> MixtralConfig:
    """Two layers, four experts; `moe_config` takes a dict of changes too."""
    moe = {"expert_num": 4, "num_experts_chosen": 2, **changes.pop("moe_config", {})}
    sizes = {
        "batch_size": 2,
        "seq_length": 16,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "compute_dtype": "float32",
        "pad_token_id": 0,
        "init_method_std": 0.2,
        **changes,
    }
    return MixtralConfig(moe_config=MoEConfig(**moe), **sizes)


def random_ids(config: MixtralConfig, seed: int = 0, rows: int | None = None) -> np.ndarray:
    """(rows, S) ids without padding."""
    shape = (rows or config.batch_size, config.seq_length)
    ids = np.random.default_rng(seed).integers(1, config.vocab_size, shape)
    return ids.astype(np.int32)


def shifted(ids: np.ndarray) -> np.ndarray:
    """Labels of ids: the id that follows, -100 at the end."""
    return np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
