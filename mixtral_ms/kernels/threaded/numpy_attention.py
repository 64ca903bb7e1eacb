"""Causal grouped-query attention with rotary embedding, in numpy; the method of attention.cpp.

Scores exist for a block of queries at a time, of all heads that share a kv head: one product. The
forward keeps the log of each row's sum, the backward computes the rows again.

Legend: B batch, S sequence, H heads, K kv heads, G heads per kv head, d head_dim, P positions,
R rows of one block: its queries times G, L keys that a block sees.
"""

from collections.abc import Iterator

import numpy as np

from mixtral_ms.kernels.threaded.parallel_blocks import empty, matmul, parallel_for

_QUERY_BLOCK = 64


def numpy_attention_forward(  # noqa: PLR0913, PLR0917 - the operator's inputs
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_BS: np.ndarray,
    segments_BS: np.ndarray,
    window: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns out (B, S, H d), the log of each row's sum (B, H, S), rotated q and rotated k.

    The rotated ones are in the order (B, K, S, G, d), in which a block's rows lie together, and q
    is scaled by 1 / sqrt(d).
    """
    batch, length, width = q.shape
    dim = cos_Pd.shape[1]
    tables = cos_Pd[positions_BS][:, :, None], sin_Pd[positions_BS][:, :, None]
    kv_heads = k.shape[2] // dim
    q_rotated = _heads_first(_rotate(_heads(q, dim), *tables), kv_heads)
    q_rotated *= np.float32(dim**-0.5)
    k_rotated = _heads_first(_rotate(_heads(k, dim), *tables), kv_heads)
    out, log_sum = empty(*q.shape), empty(batch, width // dim, length)
    out_BSKGd = out.reshape(batch, length, kv_heads, -1, dim)
    log_sum_BKSG = log_sum.reshape(batch, kv_heads, -1, length).swapaxes(2, 3)
    v_BSKd = _heads(v, dim)

    def block(task: tuple[int, int, slice, slice]) -> None:
        b, head, queries, keys = task
        rows_Rd = q_rotated[b, head, queries].reshape(-1, dim)
        scores_RL = empty(len(rows_Rd), keys.stop - keys.start)
        matmul(rows_Rd, k_rotated[b, head, keys, 0].T, scores_RL)
        _hide(scores_RL, queries, keys, segments_BS[b], window[0])
        peak_R1 = scores_RL.max(1, keepdims=True)
        scores_RL -= peak_R1
        np.exp(scores_RL, out=scores_RL)
        sum_R1 = scores_RL.sum(1, keepdims=True)
        weighted_Rd = matmul(scores_RL, v_BSKd[b, keys, head], np.empty_like(rows_Rd))
        weighted_Rd /= sum_R1
        shape = out_BSKGd[b, queries, head].shape
        out_BSKGd[b, queries, head] = weighted_Rd.reshape(shape)
        log_sum_BKSG[b, head, queries] = (peak_R1 + np.log(sum_R1)).reshape(shape[:2])

    blocks = list(_blocks(length, window[0]))
    # The last blocks see most keys: they come first, so that no thread ends on a long task alone.
    parallel_for(
        block,
        [(b, head, *one) for one in blocks[::-1] for b in range(batch) for head in range(kv_heads)],
    )
    return out, log_sum, q_rotated.reshape(q.shape), k_rotated.reshape(k.shape)


def numpy_attention_backward(  # noqa: PLR0913, PLR0917 - the operator's inputs
    q_rotated: np.ndarray,
    k_rotated: np.ndarray,
    v: np.ndarray,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_BS: np.ndarray,
    segments_BS: np.ndarray,
    window: np.ndarray,
    out: np.ndarray,
    log_sum: np.ndarray,
    d_out: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns dq, dk, dv shaped as q, k, v."""
    batch, length, width = q_rotated.shape
    dim = cos_Pd.shape[1]
    kv_heads = v.shape[2] // dim
    groups = width // v.shape[2]
    q_BKSGd = q_rotated.reshape(batch, kv_heads, length, groups, dim)
    k_BKSd = k_rotated.reshape(batch, kv_heads, length, dim)
    v_BSKd = _heads(v, dim)
    log_sum_BKSG = log_sum.reshape(batch, kv_heads, groups, length).swapaxes(2, 3)
    mean_BKSG = np.einsum("bshd,bshd->bsh", _heads(out, dim), _heads(d_out, dim))
    mean_BKSG = mean_BKSG.reshape(batch, length, kv_heads, groups).transpose(0, 2, 1, 3)
    d_out_BKSGd = _heads_first(_heads(d_out, dim), kv_heads)
    dq_BKSGd = empty(*q_BKSGd.shape)
    dk_BKSd, dv_BKSd = np.zeros_like(k_BKSd), np.zeros_like(k_BKSd)

    def kv_head(task: tuple[int, int]) -> None:
        """Owns its keys' sums, which need no lock and come in one order."""
        b, head = task
        for queries, keys in _blocks(length, window[0]):
            rows_Rd, d_rows_Rd, dq_Rd = (
                x[b, head, queries].reshape(-1, dim) for x in (q_BKSGd, d_out_BKSGd, dq_BKSGd)
            )
            k_Ld = k_BKSd[b, head, keys]
            p_RL, ds_RL = (empty(len(rows_Rd), len(k_Ld)) for _ in range(2))
            matmul(rows_Rd, k_Ld.T, p_RL)
            _hide(p_RL, queries, keys, segments_BS[b], window[0])
            p_RL -= log_sum_BKSG[b, head, queries].reshape(-1, 1)
            np.exp(p_RL, out=p_RL)
            matmul(d_rows_Rd, v_BSKd[b, keys, head].T, ds_RL)
            ds_RL -= mean_BKSG[b, head, queries].reshape(-1, 1)
            ds_RL *= p_RL
            matmul(p_RL.T, d_rows_Rd, dv_BKSd[b, head, keys], add=True)
            matmul(ds_RL.T, rows_Rd, dk_BKSd[b, head, keys], add=True)
            matmul(ds_RL, k_Ld, dq_Rd)

    parallel_for(kv_head, [(b, head) for b in range(batch) for head in range(kv_heads)])
    dq_BKSGd *= np.float32(dim**-0.5)
    tables = cos_Pd[positions_BS][:, :, None], sin_Pd[positions_BS][:, :, None]
    dq = _rotate(dq_BKSGd.swapaxes(1, 2).reshape(batch, length, -1, dim), *tables, back=True)
    dk = _rotate(dk_BKSd.swapaxes(1, 2), *tables, back=True)
    dv = dv_BKSd.swapaxes(1, 2)
    return dq.reshape(q_rotated.shape), dk.reshape(v.shape), dv.reshape(v.shape)


def _heads(x: np.ndarray, dim: int) -> np.ndarray:
    """(B, S, H d) -> (B, S, H, d)."""
    return x.reshape(*x.shape[:2], -1, dim)


def _heads_first(x_BSHd: np.ndarray, kv_heads: int) -> np.ndarray:
    """(B, S, H, d) -> (B, K, S, G, d), whose memory is in that order."""
    batch, length, _, dim = x_BSHd.shape
    x_BSKGd = x_BSHd.reshape(batch, length, kv_heads, -1, dim)
    return np.ascontiguousarray(x_BSKGd.swapaxes(1, 2))


def _rotate(
    x_BSHd: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, back: bool = False
) -> np.ndarray:
    """Pairs (i, i + d/2) turned by the angles of cos and sin (B, S, 1, d), or back by them."""
    half = x_BSHd.shape[-1] // 2
    turned = np.empty(x_BSHd.shape, x_BSHd.dtype)
    sign = -1.0 if back else 1.0
    first, second = x_BSHd[..., :half], x_BSHd[..., half:]
    np.multiply(second, sin[..., :half] * np.float32(-sign), out=turned[..., :half])
    np.multiply(first, sin[..., half:] * np.float32(sign), out=turned[..., half:])
    turned += x_BSHd * cos
    return turned


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that any of them sees."""
    for begin in range(0, length, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, length)
        yield slice(begin, end), slice(max(0, begin - int(window) + 1), end)


def _hide(
    scores_RL: np.ndarray, queries: slice, keys: slice, segments_S: np.ndarray, window: int
) -> None:
    """-inf for what a query does not see: later keys, those before the window, other segments."""
    rows = queries.stop - queries.start
    scores = scores_RL.reshape(rows, -1, scores_RL.shape[1])
    query, key = np.arange(queries.start, queries.stop)[:, None], np.arange(keys.start, keys.stop)
    hidden = key[queries.start - keys.start :] > query
    np.copyto(scores[:, :, queries.start - keys.start :], -np.inf, where=hidden[:, None])
    if keys.start > 0 or queries.stop > window:
        np.copyto(scores, -np.inf, where=(key <= query - window)[:, None])
    own, others = segments_S[queries], segments_S[keys]
    if others[0] != others[-1] or (others != others[0]).any():
        np.copyto(scores, -np.inf, where=(own[:, None] != others)[:, None])
