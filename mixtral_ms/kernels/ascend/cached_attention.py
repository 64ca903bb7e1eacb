"""Attention over the KV cache by Ascend's operators: for prediction, without gradients.

A cache that PagedAttention can read is (blocks, block_size, K, d), any other one (slots, K, d).

Legend: N sequences, t tokens of each, T = N * t tokens, H heads, K kv heads, d head_dim, M blocks
of a table, S positions that a sequence may see, C side of the mask of sparse modes 2 and 4.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import PagedAttention, ReshapeAndCache

from mixtral_ms.kernels.cells.cache_sizes import CacheSizes, Keys

PAGED_DTYPES = (mstype.float16,)
"""Of the cache, as PagedAttention and ReshapeAndCache document it."""
_BLOCK_MULTIPLE = 16  # of positions: what documentation and examples of paged attention have
_WHOLE_MASK, _CAUSAL, _BAND = 1, 2, 4
_COMPRESSED_MASK = 2048


def why_not_paged(sizes: CacheSizes) -> str:
    """Why PagedAttention cannot read such a cache; empty where it can."""
    if sizes.window is not None:
        return f"a sliding_window of {sizes.window} is none of its masks"
    if sizes.dtype not in PAGED_DTYPES:
        return f"a cache in {str(sizes.dtype).lower()} is not documented"
    if sizes.block_size % _BLOCK_MULTIPLE:
        return f"block_size {sizes.block_size} is no multiple of {_BLOCK_MULTIPLE}"
    return ""


class _CachedAttention(nn.Cell):
    """Writes keys and values of its tokens to the cache."""

    def __init__(self, sizes: CacheSizes, keys: Parameter, values: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.keys, self.values = keys, values
        self.num_heads, self.n_kv_heads = sizes.num_heads, sizes.n_kv_heads
        self.head_dim, self.window = sizes.head_dim, sizes.window
        self.scale = 1.0 / float(np.sqrt(sizes.head_dim))
        self.pages = not why_not_paged(sizes)
        self.store, self.write = ReshapeAndCache(), ops.ScatterUpdate()

    def _write(self, k_TKd: Tensor, v_TKd: Tensor, slots_T: Tensor) -> None:
        if self.pages:
            # its docstring says (T, K, d), its shape check counts all axes but the last as tokens
            rows = (1, k_TKd.shape[0], -1)
            k_1TW, v_1TW = ops.reshape(k_TKd, rows), ops.reshape(v_TKd, rows)
            self.store(k_1TW, v_1TW, self.keys, self.values, slots_T)
        else:
            self.write(self.keys, slots_T, k_TKd)
            self.write(self.values, slots_T, v_TKd)


class OwnKeys(_CachedAttention):
    """The first piece of a prompt: its tokens see each other, and nothing of the cache."""

    def construct(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        slots_T: Tensor,
        seen: None,
        limit: Tensor,
    ) -> Tensor:
        """Returns (T, H * d).

        Args:
            q_THd, k_TKd, v_TKd: rotated, in the cache's dtype.
            slots_T: int32, where each token's key and value are written.
            seen: not read.
            limit: bool (C, C), True for later keys.
        """
        self._write(k_TKd, v_TKd, slots_T)
        tokens = q_THd.shape[0]
        mode, before = _CAUSAL, tokens
        if self.window is not None:
            mode, before = _BAND, self.window - 1
        out = ops.flash_attention_score(
            ops.reshape(q_THd, (1, tokens, -1)),
            ops.reshape(k_TKd, (1, tokens, -1)),
            ops.reshape(v_TKd, (1, tokens, -1)),
            self.num_heads,
            attn_mask=limit,
            scalar_value=self.scale,
            pre_tokens=before,
            next_tokens=0,
            input_layout="BSH",
            sparse_mode=mode,
        )
        return ops.reshape(out, (tokens, -1))


class CachedKeys(_CachedAttention):
    """Tokens that see what lies in the cache, whose keys are gathered."""

    def construct(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        slots_T: Tensor,
        seen: Tensor,
        limit: Tensor,
    ) -> Tensor:
        """Returns (T, H * d); arguments as of `OwnKeys`.

        Args:
            seen: int32 (N, S), slots of the keys of each sequence.
            limit: bool (N, 1, t, S), True hides a key. Every token must see one.
        """
        self._write(k_TKd, v_TKd, slots_T)
        count, keys = seen.shape
        out = ops.flash_attention_score(
            ops.reshape(q_THd, (count, q_THd.shape[0] // count, -1)),
            ops.reshape(ops.gather(self._slots(self.keys), seen, 0), (count, keys, -1)),
            ops.reshape(ops.gather(self._slots(self.values), seen, 0), (count, keys, -1)),
            self.num_heads,
            attn_mask=limit,
            scalar_value=self.scale,
            input_layout="BSH",
            sparse_mode=_WHOLE_MASK,
        )
        return ops.reshape(out, (q_THd.shape[0], -1))

    def _slots(self, cache: Parameter) -> Tensor:
        return ops.reshape(cache, (-1, self.n_kv_heads, self.head_dim)) if self.pages else cache


class PagedKeys(_CachedAttention):
    """One token of each sequence; keys and values are read where they lie."""

    def __init__(self, sizes: CacheSizes, keys: Parameter, values: Parameter) -> None:
        super().__init__(sizes, keys, values)
        self.attend = PagedAttention(self.num_heads, self.scale, self.n_kv_heads)

    def construct(
        self,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        slots_T: Tensor,
        seen: Tensor,
        limit: Tensor,
    ) -> Tensor:
        """Returns (T, H * d); arguments as of `OwnKeys`.

        Args:
            seen: int32 (T, M), the block table of each sequence.
            limit: int32 (T,), how many positions it has, this token's among them.
        """
        self._write(k_TKd, v_TKd, slots_T)
        out = self.attend(q_THd, self.keys, self.values, seen, limit)
        return ops.reshape(out, (q_THd.shape[0], -1))


class AscendCache:
    """The cache of a layer: PagedAttention's where that operator can read it."""

    def __init__(self, sizes: CacheSizes) -> None:
        self.sizes = sizes
        problem = why_not_paged(sizes)
        self.table = not problem
        self.reads = f"keys are gathered, as {problem}" if problem else "paged attention"

    def shape(self, blocks: int) -> tuple[int, ...]:
        """As `PagedCache.shape`."""
        block_size, heads = self.sizes.block_size, self.sizes.n_kv_heads
        slots = (blocks, block_size) if self.table else (blocks * block_size,)
        return (*slots, heads, self.sizes.head_dim)

    def own_limit(self) -> Tensor:
        """As `PagedCache.own_limit`: the mask that `OwnKeys` takes."""
        side = np.arange(_COMPRESSED_MASK)
        return Tensor(side[:, None] < side[None, :])

    def attention(self, where: Keys, keys: Parameter, values: Parameter) -> nn.Cell:
        """As `PagedCache.attention`: the cell for keys that are there."""
        cells = {"own": OwnKeys, "cached": CachedKeys, "table": PagedKeys}
        return cells[where](self.sizes, keys, values)
