"""Ascend's operators of a paged KV cache on a CPU, operator by operator, as they are documented.

Sources: docstrings of MindSpore 2.7.2 (`mindspore.ops.auto_generate`). Where they are silent, of a
slot that is written twice, the cache holds NaN. float32 stands for float16, so that results can be
compared closely, unless a test asks for 16 bits.

Legend: T tokens, N heads, K kv heads, d head_dim, M blocks of a table.
"""

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from helpers.ascend_emulation import emulate_ascend, require
from mixtral_ms.kernels.ascend import cached_attention

DTYPES = (mstype.float16, mstype.float32)


def emulate_ascend_cache(monkeypatch):
    """As `emulate_ascend`, with what prediction uses besides."""
    emulate_ascend(monkeypatch)
    monkeypatch.setattr(cached_attention, "PAGED_DTYPES", DTYPES)
    monkeypatch.setattr(cached_attention, "ReshapeAndCache", ReshapeAndCache)
    monkeypatch.setattr(cached_attention, "PagedAttention", PagedAttention)


def require_cache(key_cache, value_cache):
    require(key_cache.ndim == 4, "the cache is (blocks, block_size, K, d)")
    require(key_cache.shape == value_cache.shape, "keys and values have caches of one shape")
    require(key_cache.dtype == value_cache.dtype, "and of one dtype")
    require(key_cache.dtype in DTYPES, "which is float16")


class ReshapeAndCache:
    """Writes keys and values to their slots."""

    def __call__(self, key, value, key_cache, value_cache, slot_mapping):
        require_cache(key_cache, value_cache)
        blocks, block_size, heads, width = key_cache.shape
        tokens = int(np.prod(key.shape[:-1]))
        require(key.shape == value.shape, "key and value have one shape")
        require(key.shape[-1] == heads * width, "all axes but the last count tokens")
        require(key.dtype == value.dtype == key_cache.dtype, "tokens have the cache's dtype")
        require(slot_mapping.dtype == mstype.int32, "slot_mapping is int32")
        require(slot_mapping.shape == (tokens,), "slot_mapping has a slot a token")
        slots = slot_mapping.asnumpy()
        require((slots >= 0).all() and (slots < blocks * block_size).all(), "slots are there")
        numbers, counts = np.unique(slots, return_counts=True)
        for cache, given in ((key_cache, key), (value_cache, value)):
            held = cache.asnumpy().reshape(-1, heads, width).copy()
            held[slots] = given.asnumpy().reshape(tokens, heads, width)
            held[numbers[counts > 1]] = np.nan
            cache.set_data(Tensor(held.reshape(cache.shape)))


class PagedAttention:
    """Attention of one token a sequence over the blocks of its table."""

    def __init__(self, head_num, scale_value, kv_head_num):
        require(head_num % kv_head_num == 0, "heads are a multiple of those of keys")
        self.heads, self.scale, self.kv_heads = head_num, scale_value, kv_head_num

    def __call__(self, query, key_cache, value_cache, block_tables, context_lens):
        require_cache(key_cache, value_cache)
        blocks, block_size, heads, width = key_cache.shape
        require(query.dtype == key_cache.dtype, "the query has the cache's dtype")
        require(query.ndim == 3 and query.shape[1:] == (self.heads, width), "query is (T, N, d)")
        require(heads == self.kv_heads, "the cache has the heads of keys")
        require(block_tables.dtype == context_lens.dtype == mstype.int32, "int32 tables, lengths")
        require(block_tables.shape[0] == query.shape[0], "a table a token")
        require(context_lens.shape == query.shape[:1], "a length a token")
        tables, lengths = block_tables.asnumpy(), context_lens.asnumpy()
        require((lengths >= 1).all(), "a sequence has a position")
        require((lengths <= tables.shape[1] * block_size).all(), "and its table holds all of them")
        keys, values = (one.asnumpy() for one in (key_cache, value_cache))
        out = np.empty(query.shape, np.float32)
        for token, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            own = table[: -(-length // block_size)]
            require((own >= 0).all() and (own < blocks).all(), "blocks are there")
            k_SKd, v_SKd = (one[own].reshape(-1, heads, width)[:length] for one in (keys, values))
            groups = self.heads // heads
            k_SNd, v_SNd = (np.repeat(one, groups, 1).astype(np.float32) for one in (k_SKd, v_SKd))
            scores_NS = np.einsum("nd,snd->ns", query.asnumpy()[token], k_SNd) * self.scale
            weights_NS = np.exp(scores_NS - scores_NS.max(1, keepdims=True))
            weights_NS /= weights_NS.sum(1, keepdims=True)
            out[token] = np.einsum("ns,snd->nd", weights_NS, v_SNd)
        return Tensor(out).astype(mindspore.dtype_to_nptype(query.dtype).__name__)
