"""Noise of router jitter and LoRA dropout, a pure function of a key.

Legend: T tokens, D columns.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype


def hash_uniform(
    tokens: int, columns: int, key: Tensor, salt: int, numbers_T: Tensor | None = None
) -> Tensor:
    """uniform(0, 1) of shape (T, D), float32, a function of `key`, a whole number, and of `salt`.

    numbers_T are the tokens' numbers, float32, where these are not 0, 1, ....

    A hash instead of a generator: a resumed run, and a recomputed layer, must see the same.
    Token, column and key are mixed by products and sums of their fractional parts, which
    float32 holds well; a product of sines would leave token 0 without noise at key 0.
    """
    if numbers_T is None:
        numbers_T = ops.arange(0, tokens, 1, dtype=mstype.float32)
    row_T1 = ops.expand_dims(numbers_T, 1)
    column_1D = ops.expand_dims(ops.arange(0, columns, 1, dtype=mstype.float32), 0)
    high = ops.floor(key / 4096.0)
    low = key - 4096.0 * high
    a = _fraction(row_T1 * 0.1031297)
    b = _fraction(column_1D * 0.1030619)
    c = _fraction(low * 0.618034 + high * 0.754878 + 0.56984 * salt)
    mixed = a * (b + 33.33) + b * (c + 33.33) + c * (a + 33.33)
    return _fraction((a + b + 2.0 * mixed) * (c + mixed))


def _fraction(x: Tensor) -> Tensor:
    return x - ops.floor(x)
