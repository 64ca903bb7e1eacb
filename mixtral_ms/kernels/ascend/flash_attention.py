"""Flash attention by Ascend's operator, on one rank or where ranks split the sequence.

Legend: B batch, S positions of this rank, W keys that this rank may see, H heads, K kv heads,
d head_dim, P positions of the tables, M entries of the operator's lists.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.ascend.window_blocks import HiddenInBlocks, WindowBlocks
from mixtral_ms.kernels.cells.attention import AttentionSizes
from mixtral_ms.kernels.cells.elementwise import apply_rotary, tables_at
from mixtral_ms.parallel.comm.collectives import GatherFromRanks
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup

FLOAT32_AS = mstype.bfloat16
"""The operator takes 16 bit only."""
_COMPRESSED_MASK = 2048  # side of the mask that sparse modes 2, 3 and 4 ask for
_ALL_MASK, _CAUSAL, _RIGHT_DOWN_CAUSAL, _BAND = 1, 2, 3, 4


class FlashRotaryAttention(nn.Cell):
    """Rotary embedding and `ops.flash_attention_score`, with no mask of S x S anywhere.

    Packed samples go as one row of samples with their ends (layout TND). That layout knows no
    window, and the operator's window is documented for as many keys as queries only: with packed
    samples, or where ranks split the sequence, a window goes by `window_blocks`.

    Args:
        sizes: of this rank's part of the sequence; softmax_dtype is float32 inside the kernel,
            whatever they say.
        context: the ranks that split the sequence, whose keys and values are gathered.
        fused_rotary: whether the rotary embedding is one operator too.
    """

    def __init__(
        self, sizes: AttentionSizes, context: ProcessGroup = ALONE, *, fused_rotary: bool = True
    ) -> None:
        super().__init__()
        self.fused_rotary = fused_rotary
        self.num_heads, self.n_kv_heads = sizes.num_heads, sizes.n_kv_heads
        self.head_dim, self.length = sizes.head_dim, sizes.seq_length
        self.scale = 1.0 / float(np.sqrt(sizes.head_dim))
        self.window, self.float32_as = sizes.window, FLOAT32_AS
        side = np.arange(_COMPRESSED_MASK)
        self.compressed_hidden = Tensor(side[:, None] < side[None, :])
        self.gather, self.first = None, context.index * sizes.seq_length
        self.keys = self.first + sizes.seq_length
        if context.size > 1:
            self.gather = GatherFromRanks(context, 1, partial=True)
        self.positions_S = Tensor(np.arange(self.first, self.keys, dtype=np.int32))
        self.cut: nn.Cell = None  # nobody asks for them without a window
        self.hidden_in_blocks: nn.Cell = None
        if sizes.window is not None:
            self.cut = WindowBlocks(sizes.seq_length, sizes.window)
            if context.size > 1:
                self.hidden_in_blocks = HiddenInBlocks(sizes.seq_length, sizes.window, context)

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
        if self.window is None and packed is not None:
            out = self._attend_samples(rotated_q, rotated_k, v, packed)
        elif self.window is None:
            mode = _RIGHT_DOWN_CAUSAL if self.first > 0 else _CAUSAL
            out = self._attend(rotated_q, rotated_k, v, self.compressed_hidden, mode, self.keys)
        elif packed is None and self.gather is None:
            band = self.window - 1
            out = self._attend(rotated_q, rotated_k, v, self.compressed_hidden, _BAND, band)
        else:
            out = self._attend_blocks(rotated_q, rotated_k, v, packed)
        return ops.cast(out, q.dtype)

    def _attend(  # noqa: PLR0913, PLR0917 - the operator's
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, mode: int, pre_tokens: int
    ) -> Tensor:
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

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            one = self.hidden_in_blocks.one_sample
            hidden = self.hidden_in_blocks(ops.broadcast_to(one, (q.shape[0], one.shape[1])))
        blocks = ops.reshape(q, (-1, self.cut.queries, q.shape[2]))
        out = self._attend(blocks, self.cut(k), self.cut(v), hidden, _ALL_MASK, self.cut.keys)
        return ops.reshape(out, q.shape)

    def _attend_samples(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        batch, length, width = q.shape
        most = ends.shape[-1]
        query_ends = key_ends = ends
        if self.first > 0:
            query_ends, key_ends = ends[0], ends[1]
        out = ops.flash_attention_score(
            self._row_of_samples(q, self.num_heads, most),
            self._row_of_samples(k, self.n_kv_heads, most),
            self._row_of_samples(v, self.n_kv_heads, most),
            self.num_heads,
            attn_mask=self.compressed_hidden,
            actual_seq_qlen=query_ends,
            actual_seq_kvlen=key_ends,
            scalar_value=self.scale,
            pre_tokens=2 * batch * self.keys,
            next_tokens=0,
            input_layout="TND",
            sparse_mode=_RIGHT_DOWN_CAUSAL if self.first > 0 else _CAUSAL,
        )
        if self.first == 0:
            return ops.reshape(out[: batch * length], q.shape)
        rows = batch * (length + 1)
        return ops.reshape(out[:rows], (batch, length + 1, width))[:, 1:]

    def _row_of_samples(self, x_BSD: Tensor, heads: int, filler: int) -> Tensor:
        """(tokens + M, heads, d): every entry must have a token (`SampleEnds`)."""
        batch, length, width = x_BSD.shape
        if self.first > 0:
            x_BSD = ops.cat((ops.zeros((batch, 1, width), x_BSD.dtype), x_BSD), 1)
            length += 1
        x = ops.reshape(x_BSD, (batch * length, heads, self.head_dim))
        return ops.cat((x, ops.zeros((filler, heads, self.head_dim), x.dtype)), 0)

    def _rotated(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        x_BSHd = ops.reshape(x, (batch, length, heads, self.head_dim))
        if self.fused_rotary:
            # tables and values of one dtype, heads where they lie: nothing is transposed
            dtype = cos.dtype if x.dtype == cos.dtype else mstype.float32
            cos = ops.cast(ops.reshape(cos, (-1, length, 1, self.head_dim)), dtype)
            sin = ops.cast(ops.reshape(sin, (-1, length, 1, self.head_dim)), dtype)
            turned = ops.rotary_position_embedding(ops.cast(x_BSHd, dtype), cos, sin, 0)
            return ops.cast(ops.reshape(turned, x.shape), x.dtype)
        x_BHSd = apply_rotary(ops.transpose(x_BSHd, (0, 2, 1, 3)), cos, sin)
        return ops.reshape(ops.transpose(x_BHSd, (0, 2, 1, 3)), (batch, length, width))
