"""Causal grouped-query attention with rotary embedding: in plain operators, and in C++ or numpy.

Legend: B batch, S sequence, H heads, K kv heads, G heads per kv head, d head_dim, P positions.
"""

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.elementwise import apply_rotary, tables_at
from mixtral_ms.kernels.native import custom_ops
from mixtral_ms.parallel.comm.graph_primitives import zeros_like

# Finite, so that a row that is wholly masked gives no NaN; far below any score in float16 too.
_MASKED = -3.0e4
_MIN_CHUNK = 64
_CHUNKS = 4


@dataclass(frozen=True)
class AttentionSizes:
    """What an attention's graph depends on.

    Args:
        seq_length: S, queries of a row.
        num_heads: H.
        n_kv_heads: K, a divisor of H.
        head_dim: d.
        window: a position sees itself and window - 1 before it; None for all before it.
        softmax_dtype: dtype of the scores and their softmax, where the kernel has a choice.
        first: position of the first query among the keys.
        keys: how many keys there are; None for as many as queries.
    """

    seq_length: int
    num_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None = None
    softmax_dtype: mstype.Type = mstype.float32
    first: int = 0
    keys: int | None = None


class PackedSamples(nn.Cell):
    """What an attention is given in place of segment ids: of the host, then once for all layers."""

    limit: int | None = None
    """Samples that a micro batch may hold."""

    def prepared(self, segment_ids_BS: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
        """By the host, of a micro batch: the graph's input, of a shape that is always the same."""
        raise NotImplementedError


def visible(query: np.ndarray, key: np.ndarray, window: int | None) -> np.ndarray:
    """Which (query, key) position pairs are allowed: causal, and within the sliding window."""
    distance = query[:, None] - key[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


class CausalAttention(nn.Cell):
    """softmax(q k^T / sqrt(d) + mask) v over blocks of queries.

    A block of queries reads only the keys that some query of it may see, which leaves about
    five eighths of the products of a full causal score matrix with the four blocks used here.

    Args:
        sizes: fixed for the compiled graph.
        chunk: queries per block; S gives the plain reference, None a quarter of S.
    """

    def __init__(self, sizes: AttentionSizes, chunk: int | None = None) -> None:
        super().__init__()
        self.n_kv_heads, self.groups = sizes.n_kv_heads, sizes.num_heads // sizes.n_kv_heads
        self.seq_length, self.head_dim = sizes.seq_length, sizes.head_dim
        self.scale = 1.0 / float(np.sqrt(sizes.head_dim))
        self.softmax_dtype = sizes.softmax_dtype
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.weighted = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)
        chunk = chunk or max(_MIN_CHUNK, -(-sizes.seq_length // _CHUNKS))
        self.first, self.spans = sizes.first, _spans(sizes, chunk)
        keys = np.arange(sizes.keys or sizes.seq_length)
        queries = keys[sizes.first :]
        masks = [
            visible(queries[a:b], keys[low : sizes.first + b], sizes.window)
            for a, b, low in self.spans
        ]
        self.masks = tuple(
            Tensor(np.where(mask, 0.0, _MASKED)[None, None].astype(np.float32)) for mask in masks
        )

    def construct(
        self,
        q_BHSd: Tensor,
        k_BKSd: Tensor,
        v_BKSd: Tensor,
        segment_ids_BS: Tensor | None = None,
        key_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, H, S, d); positions of different segments do not see each other.

        key_segment_ids are those of the keys, where these are others than the queries'.
        """
        batch = q_BHSd.shape[0]
        key_ids: Tensor = key_segment_ids
        if key_segment_ids is None:
            key_ids = segment_ids_BS
        q = ops.reshape(
            q_BHSd * self.scale,
            (batch, self.n_kv_heads, self.groups, self.seq_length, self.head_dim),
        )
        outputs: tuple[Tensor, ...] = ()
        for i in range(len(self.spans)):
            begin, end, low = self.spans[i]
            rows, high = end - begin, self.first + end
            q_rows = ops.reshape(
                q[:, :, :, begin:end], (batch, self.n_kv_heads, self.groups * rows, self.head_dim)
            )
            scores = ops.cast(self.scores(q_rows, k_BKSd[:, :, low:high]), self.softmax_dtype)
            scores = ops.reshape(
                scores, (batch, self.n_kv_heads * self.groups, rows, high - low)
            ) + ops.cast(self.masks[i], self.softmax_dtype)
            if segment_ids_BS is not None:
                same = ops.equal(
                    ops.expand_dims(segment_ids_BS[:, begin:end], 2),
                    ops.expand_dims(key_ids[:, low:high], 1),
                )
                hidden = ops.cast(ops.logical_not(same), self.softmax_dtype) * _MASKED
                scores = scores + ops.expand_dims(hidden, 1)
            weights = ops.cast(self.softmax(scores), v_BKSd.dtype)
            weights = ops.reshape(weights, (batch, self.n_kv_heads, self.groups * rows, high - low))
            out = self.weighted(weights, v_BKSd[:, :, low:high])
            outputs += (
                ops.reshape(out, (batch, self.n_kv_heads * self.groups, rows, self.head_dim)),
            )
        return outputs[0] if len(outputs) == 1 else ops.cat(outputs, 2)


class PlainRotaryAttention(nn.Cell):
    """Rotary embedding and `CausalAttention` on projected queries, keys and values.

    A subclass may take keys from elsewhere too: `own_positions`, `all_keys` and `all_segments`.
    """

    def __init__(self, sizes: AttentionSizes) -> None:
        super().__init__()
        self.num_heads, self.n_kv_heads = sizes.num_heads, sizes.n_kv_heads
        self.head_dim = sizes.head_dim
        self.attend = CausalAttention(sizes)

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
        """q (B, S, H d), k and v (B, S, K d) -> (B, S, H d).

        Positions index cos and sin, None counts from 0; segments do not see each other.
        """
        cos, sin = tables_at(cos_Pd, sin_Pd, self.own_positions(q.shape[0], positions_BS))
        q_BHSd = apply_rotary(self._heads(q, self.num_heads), cos, sin)
        k_BKSd = self.all_keys(apply_rotary(self._heads(k, self.n_kv_heads), cos, sin))
        v_BKSd = self.all_keys(self._heads(v, self.n_kv_heads))
        key_segment_ids = self.all_segments(segment_ids_BS)
        out_BHSd = self.attend(q_BHSd, k_BKSd, v_BKSd, segment_ids_BS, key_segment_ids)
        return ops.reshape(ops.transpose(out_BHSd, (0, 2, 1, 3)), q.shape)

    def own_positions(self, batch: int, positions_BS: Tensor | None) -> Tensor | None:
        """Positions of this cell's queries."""
        return positions_BS

    def all_keys(self, x_BKSd: Tensor) -> Tensor:
        """The keys, or the values, of every position that is attended to."""
        return x_BKSd

    def all_segments(self, segment_ids_BS: Tensor | None) -> Tensor | None:
        """Segments of those positions."""
        return segment_ids_BS

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        batch, length, _ = x.shape
        return ops.transpose(ops.reshape(x, (batch, length, heads, self.head_dim)), (0, 2, 1, 3))


class NativeRotaryAttention(nn.Cell):
    """The same in C++ or numpy (float32): scores exist for a block of queries at a time.

    Args:
        library: where the kernels are.
        sizes: softmax_dtype is float32, whatever they say.
    """

    def __init__(self, library: custom_ops.Library, sizes: AttentionSizes) -> None:
        super().__init__()
        self.attend = _NativeAttention(library)
        self.window = Tensor([sizes.window or sizes.seq_length], mstype.int32)
        self.positions_1S = Tensor(np.arange(sizes.seq_length, dtype=np.int32)[None])

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
        """As `PlainRotaryAttention`."""
        shape = q.shape[:2]
        if positions_BS is None:
            positions_BS = ops.tile(self.positions_1S, (shape[0], 1))
        if segment_ids_BS is None:
            segment_ids_BS = ops.zeros(shape, mstype.int32)
        # rotary_dtype may be narrower than the compute dtype; the kernel reads float32.
        cos_Pd, sin_Pd = ops.cast(cos_Pd, mstype.float32), ops.cast(sin_Pd, mstype.float32)
        return self.attend(q, k, v, cos_Pd, sin_Pd, positions_BS, segment_ids_BS, self.window)[0]


class _NativeAttention(nn.Cell):
    def __init__(self, library: custom_ops.Library) -> None:
        super().__init__()
        self.forward = custom_ops.attention_forward(library)
        self.backward = custom_ops.attention_backward(library)

    def construct(  # noqa: PLR0913 - the operator's inputs
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        segments: Tensor,
        window: Tensor,
    ) -> tuple:
        return self.forward(q, k, v, cos, sin, positions, segments, window)

    def bprop(  # noqa: PLR0913, PLR0917 - MindSpore's signature: inputs, outputs, their gradients
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        segments: Tensor,
        window: Tensor,
        out: tuple,
        dout: tuple,
    ) -> tuple:
        attended, log_sum, q_rotated, k_rotated = out
        dq, dk, dv = self.backward(
            q_rotated,
            k_rotated,
            v,
            cos,
            sin,
            positions,
            segments,
            window,
            attended,
            log_sum,
            dout[0],
        )
        return (
            dq,
            dk,
            dv,
            zeros_like(cos),
            zeros_like(sin),
            zeros_like(positions),
            zeros_like(segments),
            zeros_like(window),
        )


def _spans(sizes: AttentionSizes, chunk: int) -> tuple[tuple[int, int, int], ...]:
    """(first query, end of queries, first key) of each block."""
    spans = []
    for begin in range(0, sizes.seq_length, chunk):
        low = 0 if sizes.window is None else max(0, sizes.first + begin - sizes.window + 1)
        spans.append((begin, min(begin + chunk, sizes.seq_length), low))
    return tuple(spans)
