"""The network on a device: in the weights' 16 bits, over a paged KV cache, with static shapes.

Over several ranks as in graph_network.py. What a token's numbers are depends on the graph that it
is in, by rounding: the CPU's form, which has none of that, costs a device too much.

Legend: as graph_network.py; R rows of logits, M blocks of a table.
"""

from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.parameter_table import (
    ATTENTION_NORM,
    EMBEDDING,
    FFN_NORM,
    FINAL_NORM,
    KEY,
    LM_HEAD,
    OUTPUT,
    QUERY,
    VALUE,
)
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.infer.runners.graph_network import Projection, SharedParameters, SparseExperts
from mixtral_ms.kernels.cells.cache_sizes import Keys
from mixtral_ms.kernels.cells.elementwise import apply_rotary
from mixtral_ms.kernels.kernel_choice import KernelChoice, PagedCache
from mixtral_ms.model.nn.compute_dtype import compute_type
from mixtral_ms.parallel.comm import transports


@dataclass(frozen=True)
class StepShape:
    """What a compiled graph is for."""

    sequences: int
    tokens: int
    """Of each sequence, padding included."""
    where: Keys
    keys: int
    """Positions of the cache that are gathered; 0 where none are."""
    rows: int
    """Tokens with logits."""

    def __str__(self) -> str:
        """For the log."""
        cached = f", {self.keys} cached positions" if self.keys else ""
        if self.tokens == 1:
            return f"a token of each of {self.sequences} sequences{cached}"
        scored = "" if self.rows == 1 else ", all with logits"
        return f"a piece of {self.tokens} tokens{cached}{scored}"


@dataclass(frozen=True)
class DeviceParts:
    """What layers are made of, besides the shared parameters."""

    kernels: KernelChoice
    cache: PagedCache
    cos_Pd: Parameter
    """Rotary tables of all positions."""
    sin_Pd: Parameter


class PagedAttentionLayer(nn.Cell):
    """Projections, rotary embedding, cache and attention."""

    def __init__(
        self,
        config: MixtralConfig,
        shared: SharedParameters,
        parts: DeviceParts,
        layer: int,
        where: Keys,
    ) -> None:
        super().__init__(auto_prefix=False)
        ranks = shared.mesh.tensor
        self.wq, self.wk, self.wv = (Projection(shared, row, layer) for row in (QUERY, KEY, VALUE))
        self.wo = Projection(shared, OUTPUT, layer, ranks)
        self.heads = config.num_heads // ranks.size
        self.kv_heads = config.n_kv_heads // ranks.size
        self.head_dim, self.dtype = config.head_dim, parts.cache.sizes.dtype
        keys, values = shared.keys[layer], shared.values[layer]
        self.attend = parts.cache.attention(where, keys, values)

    def construct(
        self,
        x_TD: Tensor,
        cos_T1d: Tensor,
        sin_T1d: Tensor,
        slots_T: Tensor,
        seen: Tensor | None,
        limit: Tensor,
    ) -> Tensor:
        """Returns (T, D)."""
        tokens = x_TD.shape[0]
        q = ops.reshape(self.wq(x_TD), (tokens, self.heads, self.head_dim))
        k = ops.reshape(self.wk(x_TD), (tokens, self.kv_heads, self.head_dim))
        v = ops.reshape(self.wv(x_TD), (tokens, self.kv_heads, self.head_dim))
        q = ops.cast(apply_rotary(q, cos_T1d, sin_T1d), self.dtype)
        k = ops.cast(apply_rotary(k, cos_T1d, sin_T1d), self.dtype)
        out_TD = self.attend(q, k, ops.cast(v, self.dtype), slots_T, seen, limit)
        return self.wo(ops.cast(out_TD, x_TD.dtype))


class PagedLayer(nn.Cell):
    """A decoder layer."""

    def __init__(
        self,
        config: MixtralConfig,
        shared: SharedParameters,
        parts: DeviceParts,
        layer: int,
        where: Keys,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.dtype = shared.dtype
        self.norm = parts.kernels.rms_norm(config.rms_norm_eps)
        self.attention_norm = shared.weight(ATTENTION_NORM, layer)
        self.ffn_norm = shared.weight(FFN_NORM, layer)
        self.attention = PagedAttentionLayer(config, shared, parts, layer, where)
        self.experts = SparseExperts(config, shared, layer, parts.kernels)

    def construct(
        self,
        x_TD: Tensor,
        cos_T1d: Tensor,
        sin_T1d: Tensor,
        slots_T: Tensor,
        seen: Tensor | None,
        limit: Tensor,
        valid_T: Tensor,
        positions_T: Tensor,
    ) -> Tensor:
        """Returns (T, D)."""
        normed = ops.cast(self.norm(x_TD, self.attention_norm()), self.dtype)
        x_TD = x_TD + self.attention(normed, cos_T1d, sin_T1d, slots_T, seen, limit)
        normed = ops.cast(self.norm(x_TD, self.ffn_norm()), self.dtype)
        return x_TD + self.experts(normed, valid_T, positions_T)


class PagedNetwork(nn.Cell):
    """All of the network, from ids to logits, for one static shape.

    Args:
        config: the network's sizes.
        shared: weights and cache.
        parts: what layers are made of.
        shape: of the steps that it is for.
    """

    def __init__(
        self,
        config: MixtralConfig,
        shared: SharedParameters,
        parts: DeviceParts,
        shape: StepShape,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = shared.tensors[EMBEDDING.name]
        self.residual_dtype = shared.dtype
        if config.residual_dtype is not None:
            self.residual_dtype = compute_type(config.residual_dtype)
        self.cos_Pd, self.sin_Pd = parts.cos_Pd, parts.sin_Pd
        self.sequences, self.window, self.rows = shape.sequences, config.sliding_window, shape.rows
        self.cached, self.table = shape.where == "cached", shape.where == "table"
        self.key_positions_S = (
            Tensor(np.arange(shape.keys, dtype=np.int32)) if self.cached else None
        )
        self.own_limit = parts.cache.own_limit() if shape.where == "own" else None
        layers = range(config.num_layers)
        self.layers = nn.CellList(
            [PagedLayer(config, shared, parts, layer, shape.where) for layer in layers],
            auto_prefix=False,
        )
        self.norm, self.norm_weight = (
            parts.kernels.rms_norm(config.rms_norm_eps),
            shared.weight(FINAL_NORM),
        )
        self.head = shared.weight(EMBEDDING if config.tie_word_embeddings else LM_HEAD)
        self.product = ops.MatMul(transpose_b=True)
        # a tied embedding is whole on every rank
        split = shared.mesh.tensor.size > 1 and not config.tie_word_embeddings
        self.gather = transports.all_gather(shared.mesh.tensor) if split else None

    def construct(
        self,
        token_ids_T: Tensor,
        valid_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        seen: Tensor | None,
        lengths_N: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """Returns logits, float32 (R, V).

        Args:
            token_ids_T: int32; 0 for padding.
            valid_T: the padding mask: which tokens are no padding.
            positions_T: int32, of the tokens in their sequences.
            slots_T: int32, where each token's key and value are written.
            seen: int32, block tables (N, M), or slots (N, S) of the keys of each sequence.
            lengths_N: int32, with block tables: positions that each sequence has.
            rows_R: int32, which tokens want logits; None for all.
        """
        x = ops.cast(ops.gather(self.embedding, token_ids_T, 0), self.residual_dtype)
        cos = ops.expand_dims(ops.gather(self.cos_Pd, positions_T, 0), 1)
        sin = ops.expand_dims(ops.gather(self.sin_Pd, positions_T, 0), 1)
        limit = lengths_N if self.table else self.own_limit
        if self.cached:
            limit = self._hidden(positions_T)
        for layer in self.layers:
            x = layer(x, cos, sin, slots_T, seen, limit, valid_T, positions_T)
        if rows_R is not None:
            x = ops.gather(x, rows_R, 0)
        x = self.norm(x, self.norm_weight())
        weight = self.head()
        x = ops.cast(x, weight.dtype)
        if self.gather is None:
            return ops.cast(self.product(x, weight), mstype.float32)
        scores_VR = ops.reshape(self.gather(self.product(weight, x)), (-1, x.shape[0]))
        return ops.cast(ops.transpose(scores_VR, (1, 0)), mstype.float32)

    def _hidden(self, positions_T: Tensor) -> Tensor:
        """(N, 1, t, S), True where a token must not see a position of the cache."""
        positions_Nt = ops.reshape(positions_T, (self.sequences, 1, -1, 1))
        hidden = self.key_positions_S > positions_Nt
        if self.window is not None:
            behind = positions_Nt - self.key_positions_S >= self.window
            hidden = ops.logical_or(hidden, behind)
        return hidden
