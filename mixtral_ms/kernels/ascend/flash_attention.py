"""Flash attention by Ascend's operator, on one rank or where ranks split the sequence.

Legend: B batch, S positions of this rank, W keys that this rank may see, T = B * S tokens, H heads,
K kv heads, d head_dim, P positions of the tables, M most samples and a filler.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.ascend.packed_samples import hidden_positions, most_samples
from mixtral_ms.kernels.cells.attention import AttentionSizes
from mixtral_ms.kernels.cells.elementwise import apply_rotary, tables_at
from mixtral_ms.parallel.comm.collectives import GatherFromRanks
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup

FLOAT32_AS = mstype.bfloat16
"""The operator takes 16 bit only."""
_COMPRESSED_MASK = 2048  # side of the mask that sparse modes 2, 3 and 4 ask for
_WHOLE_MASK, _CAUSAL, _RIGHT_DOWN_CAUSAL, _BAND = 0, 2, 3, 4


class FlashRotaryAttention(nn.Cell):
    """Rotary embedding and `ops.flash_attention_score`.

    No mask of S x S is ever a constant. Packed samples go as a row of samples with their ends
    (layout TND), which the operator knows for plain causal attention alone; with a sliding window,
    and where ranks split the sequence, `packed_samples.HiddenKeys` makes one mask for all layers.

    Args:
        sizes: of this rank's part of the sequence; softmax_dtype is float32 inside the kernel,
            whatever they say.
        context: the ranks that split the sequence, whose keys and values are gathered.
    """

    def __init__(self, sizes: AttentionSizes, context: ProcessGroup = ALONE) -> None:
        super().__init__()
        self.num_heads, self.n_kv_heads = sizes.num_heads, sizes.n_kv_heads
        self.head_dim, self.length = sizes.head_dim, sizes.seq_length
        self.scale = 1.0 / float(np.sqrt(sizes.head_dim))
        self.window, self.float32_as = sizes.window, FLOAT32_AS
        side = np.arange(_COMPRESSED_MASK)
        self.compressed_hidden = Tensor(side[:, None] < side[None, :])
        self.gather, self.first = None, context.index * sizes.seq_length
        self.keys = self.first + sizes.seq_length
        self.band = self.keys if sizes.window is None else sizes.window - 1
        if context.size > 1:
            self.gather = GatherFromRanks(context, 1, partial=True)
        self.positions_S = Tensor(np.arange(self.first, self.keys, dtype=np.int32))
        self.positions_W = Tensor(np.arange(self.keys, dtype=np.int32))
        self.packed_as_samples = context.size == 1 and sizes.window is None

    def construct(  # noqa: PLR0913 - the inputs of attention
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_Pd: Tensor,
        sin_Pd: Tensor,
        positions_BS: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> Tensor:
        """As `attention.PlainRotaryAttention`; `packed` is what `packed_samples` gave."""
        if positions_BS is None and self.first > 0:
            positions_BS = ops.broadcast_to(self.positions_S, q.shape[:2])
        cos, sin = tables_at(cos_Pd[: self.keys], sin_Pd[: self.keys], positions_BS)
        dtype = self.float32_as if q.dtype == mstype.float32 else q.dtype
        rotated_q = ops.cast(self._rotated(q, self.num_heads, cos, sin), dtype)
        rotated_k = ops.cast(self._rotated(k, self.n_kv_heads, cos, sin), dtype)
        v = ops.cast(v, dtype)
        if self.gather is not None:
            rotated_k = self.gather(rotated_k)[:, : self.keys]
            v = self.gather(v)[:, : self.keys]
        if packed is not None and self.packed_as_samples:
            out = self._attend_samples(rotated_q, rotated_k, v, packed)
        else:
            out = self._attend(rotated_q, rotated_k, v, packed)
        return ops.cast(out, q.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        mode, pre_tokens = _WHOLE_MASK, self.keys
        if hidden is None and self.window is None:
            hidden = self.compressed_hidden
            mode = _CAUSAL if self.gather is None else _RIGHT_DOWN_CAUSAL
        elif hidden is None and self.gather is None:
            hidden, mode, pre_tokens = self.compressed_hidden, _BAND, self.band
        elif hidden is None:
            # what the band mode means for more keys than queries is not documented
            hidden = hidden_positions(self.positions_S, self.positions_W, self.window)
        return ops.flash_attention_score(
            q,
            k,
            v,
            self.num_heads,
            attn_mask=hidden,
            scalar_value=self.scale,
            pre_tokens=pre_tokens,
            next_tokens=0,
            input_layout="BSH",
            sparse_mode=mode,
        )

    def _attend_samples(self, q: Tensor, k: Tensor, v: Tensor, ends_M: Tensor) -> Tensor:
        tokens = q.shape[0] * q.shape[1]
        out = ops.flash_attention_score(
            self._with_filler(q, tokens, self.num_heads),
            self._with_filler(k, tokens, self.n_kv_heads),
            self._with_filler(v, tokens, self.n_kv_heads),
            self.num_heads,
            attn_mask=self.compressed_hidden,
            actual_seq_qlen=ends_M,
            actual_seq_kvlen=ends_M,
            scalar_value=self.scale,
            pre_tokens=2 * tokens,
            next_tokens=0,
            input_layout="TND",
            sparse_mode=_CAUSAL,
        )
        return ops.reshape(out[:tokens], q.shape)

    def _with_filler(self, x_BSD: Tensor, tokens: int, heads: int) -> Tensor:
        """(T + M, heads, d): every sample must have a token, those that are not there too."""
        x_THd = ops.reshape(x_BSD, (tokens, heads, self.head_dim))
        filler = ops.zeros((most_samples(tokens), heads, self.head_dim), x_BSD.dtype)
        return ops.cat((x_THd, filler), 0)

    def _rotated(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        x_BSHd = ops.reshape(x, (batch, length, heads, self.head_dim))
        x_BHSd = apply_rotary(ops.transpose(x_BSHd, (0, 2, 1, 3)), cos, sin)
        return ops.reshape(ops.transpose(x_BHSd, (0, 2, 1, 3)), (batch, length, width))
