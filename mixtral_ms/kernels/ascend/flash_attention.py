"""Flash attention by Ascend's operator.

Legend: B batch, S sequence, H heads, d head_dim, P positions.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.attention import AttentionSizes, visible
from mixtral_ms.kernels.cells.elementwise import apply_rotary, tables_at

_COMPRESSED_MASK = 2048  # side of the mask that sparse modes 2 and 4 ask for
_WHOLE_MASK, _CAUSAL, _BAND = 0, 2, 4


class FlashRotaryAttention(nn.Cell):
    """Rotary embedding and `ops.flash_attention_score` in its BSH layout.

    The kernel takes float16 and bfloat16; float32 inputs are computed as bfloat16.

    Args:
        sizes: softmax_dtype is float32 inside the kernel, whatever they say.
    """

    def __init__(self, sizes: AttentionSizes) -> None:
        super().__init__()
        self.num_heads, self.n_kv_heads = sizes.num_heads, sizes.n_kv_heads
        self.head_dim = sizes.head_dim
        self.scale = 1.0 / float(np.sqrt(sizes.head_dim))
        self.sparse_mode = _CAUSAL if sizes.window is None else _BAND
        self.pre_tokens = sizes.seq_length if sizes.window is None else sizes.window - 1
        side = np.arange(_COMPRESSED_MASK)
        self.compressed_hidden = Tensor(~visible(side, side, None))
        rows = np.arange(sizes.seq_length)
        self.hidden_SS = Tensor(~visible(rows, rows, sizes.window))

    def construct(  # noqa: PLR0913 - the inputs of attention
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_Pd: Tensor,
        sin_Pd: Tensor,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """As `attention.PlainRotaryAttention`."""
        cos, sin = tables_at(cos_Pd, sin_Pd, positions_BS)
        dtype = mstype.bfloat16 if q.dtype == mstype.float32 else q.dtype
        hidden, mode = self.compressed_hidden, self.sparse_mode
        if segment_ids_BS is not None:
            other = ops.not_equal(
                ops.expand_dims(segment_ids_BS, 2), ops.expand_dims(segment_ids_BS, 1)
            )
            hidden, mode = ops.expand_dims(ops.logical_or(other, self.hidden_SS), 1), _WHOLE_MASK
        out = ops.flash_attention_score(
            ops.cast(self._rotated(q, self.num_heads, cos, sin), dtype),
            ops.cast(self._rotated(k, self.n_kv_heads, cos, sin), dtype),
            ops.cast(v, dtype),
            self.num_heads,
            attn_mask=hidden,
            scalar_value=self.scale,
            pre_tokens=self.pre_tokens,
            next_tokens=0,
            input_layout="BSH",
            sparse_mode=mode,
        )
        return ops.cast(out, q.dtype)

    def _rotated(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        x_BSHd = ops.reshape(x, (batch, length, heads, self.head_dim))
        x_BHSd = apply_rotary(ops.transpose(x_BSHd, (0, 2, 1, 3)), cos, sin)
        return ops.reshape(ops.transpose(x_BHSd, (0, 2, 1, 3)), (batch, length, width))
