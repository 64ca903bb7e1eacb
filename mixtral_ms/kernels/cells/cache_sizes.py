"""What attention over a paged KV cache depends on."""

from dataclasses import dataclass
from typing import Literal

from mindspore import dtype as mstype

Keys = Literal["own", "cached", "table"]
"""Where the keys of a step are: `own` are those of its tokens alone, `cached` also those that lie
in the cache, `table` the same for one token of each sequence, by the sequences' block tables."""


@dataclass(frozen=True)
class CacheSizes:
    """The KV cache of one layer on one rank.

    Args:
        num_heads: H, of the queries.
        n_kv_heads: K, a divisor of H.
        head_dim: d.
        block_size: positions in a block.
        window: a position sees itself and window - 1 before it; None for all before it.
        dtype: of the cache, and of queries, keys and values.
    """

    num_heads: int
    n_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    dtype: mstype.Type
