"""RMSNorm, rotary embedding and SwiGLU in plain operators, the same on every backend.

Legend: B batch, S sequence, H heads, d head_dim, D hidden.
"""

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32 and returned in x's dtype (arXiv 1910.07467)."""
    x32 = ops.cast(x, mstype.float32)
    scale = ops.rsqrt(ops.mean(ops.square(x32), -1, keep_dims=True) + eps)
    return ops.cast(x32 * scale * ops.cast(weight_D, mstype.float32), x.dtype)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, (length, head_dim) float32, both halves alike."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse[None, :]
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)


def tables_at(cos_Pd: Tensor, sin_Pd: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin to rotate (B, H, S, d) with: (B, 1, S, d), or as given without positions."""
    if positions_BS is None:
        return cos_Pd, sin_Pd
    cos = ops.expand_dims(ops.gather(cos_Pd, positions_BS, 0), 1)
    return cos, ops.expand_dims(ops.gather(sin_Pd, positions_BS, 0), 1)


def apply_rotary(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2), the half-split convention of Hugging Face (arXiv 2104.09864).

    cos and sin broadcast against (B, H, S, d): (S, d), or (B, 1, S, d) for packed positions.
    """
    half = x_BHSd.shape[-1] // 2
    first, second = x_BHSd[..., :half], x_BHSd[..., half:]
    rotated = ops.cat((-second, first), axis=-1)
    return ops.cast(x_BHSd * cos + rotated * sin, x_BHSd.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return gate * ops.sigmoid(gate) * up
