"""Contracts of the operators of a paged KV cache, as those in operator_contracts.py.

Their docstrings also say "No backend implementation in MindSpore"; the wheel's libraries for Ascend
have one of each. Legend: T tokens, N heads, K kv heads, D width of a head.
"""

import math
from collections.abc import Iterator

from ascend.operator_contracts import Check, number

from mixtral_ms.graphs.typed_graph import Node, TensorType


def paged_attention(node: Node) -> Iterator[str]:
    """PagedAttention(query, key_cache, value_cache, block_tables, context_lens, five of None, ...).

    float16; query (T, N, D), caches (blocks, block_size, K, D), a table and a length a token. Its
    docstring does not say what block_size may be: 16 is its example's, and incre_flash_attention,
    which reads the same cache, asks for a multiple of that.
    """
    query, keys, values, tables, lengths = (node.inputs[place][0] for place in range(5))
    yield from _paged_cache(keys, values)
    if query.dtype != keys.dtype or len(query.shape) != 3 or query.shape[2:] != keys.shape[3:]:
        yield f"query {query} for a cache {keys}"
    for one, shape in ((tables, (query.shape[0], tables.shape[-1])), (lengths, query.shape[:1])):
        if (one.dtype, one.shape) != ("Int32", shape):
            yield f"{one.dtype} {list(one.shape)}, not Int32 {list(shape)}"
    if any(one != "None" for one in node.arguments[5:10]):
        yield "scales, masks and lengths of queries were not looked up"
    heads, _, kv_heads = (number(one) for one in node.arguments[10:13])
    if heads != query.shape[1] or kv_heads != keys.shape[2] or heads % kv_heads:
        yield f"head_num {heads:g}, kv_head_num {kv_heads:g} for {query} and {keys}"


def reshape_and_cache(node: Node) -> Iterator[str]:
    """ReshapeAndCache(key, value, key_cache, value_cache, slot_mapping).

    The docstring has keys as (T, K, D); the shape check of 2.7.2 takes all axes but the last for
    tokens, and so do those who call it.
    """
    key, value, keys, values, slots = (node.inputs[place][0] for place in range(5))
    yield from _paged_cache(keys, values)
    tokens = math.prod(key.shape[:-1])
    if key != value or key.dtype != keys.dtype or key.shape[-1] != math.prod(keys.shape[2:]):
        yield f"key {key}, value {value} for a cache {keys}"
    if (slots.dtype, slots.shape) != ("Int32", (tokens,)):
        yield f"slots are {slots.dtype} {list(slots.shape)}, not Int32 [{tokens}]"


def _paged_cache(keys: TensorType, values: TensorType) -> Iterator[str]:
    if keys != values or keys.dtype != "Float16" or len(keys.shape) != 4:
        yield f"caches are {keys} and {values}, not float16 (blocks, block_size, K, D)"
    elif keys.shape[1] % 16:
        yield f"block_size {keys.shape[1]} is no multiple of 16"


CACHE_OPERATORS: dict[str, Check] = {
    "PagedAttention": paged_attention,
    "ReshapeAndCache": reshape_and_cache,
}
