"""The experts' SwiGLU networks over rows grouped by expert, in numpy: nothing is padded.

MindSpore runs both functions as `ops.Custom` operators on the CPU. Groups have sizes that are known
only when they run, for which MindSpore itself would pad them and gather a weight for each block.

Legend: R rows sorted by expert, D hidden, F intermediate, E experts, N rows of one group.
"""

from collections.abc import Iterator

import numpy as np

_ROW_BLOCK = 128  # rows whose activations stay in the cache between two products


def forward(
    x_RD: np.ndarray,
    w1_EFD: np.ndarray,
    w3_EFD: np.ndarray,
    w2_EDF: np.ndarray,
    sizes_E: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns y (R, D), gate (R, F), up (R, F) in x's dtype; rows past the groups are zero."""
    y_RD = np.zeros_like(x_RD)
    gate_RF = np.zeros((len(x_RD), w1_EFD.shape[1]), x_RD.dtype)
    up_RF = np.zeros_like(gate_RF)
    with np.errstate(all="ignore"):  # what overflows is infinite, and the overflow check sees it
        for e, begin, end in groups(sizes_E):
            w1, w3, w2 = as_float32(w1_EFD[e]), as_float32(w3_EFD[e]), as_float32(w2_EDF[e])
            for rows in _blocks(begin, end):
                x = as_float32(x_RD[rows])
                gate, up = x @ w1.T, x @ w3.T
                gate_RF[rows], up_RF[rows] = gate, up
                gate *= sigmoid(gate)
                gate *= up
                y_RD[rows] = gate @ w2.T
    return y_RD, gate_RF, up_RF


def backward(  # noqa: PLR0913, PLR0917 - the operator's inputs
    x_RD: np.ndarray,
    w1_EFD: np.ndarray,
    w3_EFD: np.ndarray,
    w2_EDF: np.ndarray,
    sizes_E: np.ndarray,
    gate_RF: np.ndarray,
    up_RF: np.ndarray,
    dy_RD: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns dx, dw1, dw3, dw2, shaped as x and the weights."""
    dx_RD = np.zeros_like(x_RD)
    dw1_EFD, dw3_EFD, dw2_EDF = (np.zeros_like(w) for w in (w1_EFD, w3_EFD, w2_EDF))
    with np.errstate(all="ignore"):
        for e, begin, end in groups(sizes_E):
            w1, w3, w2 = as_float32(w1_EFD[e]), as_float32(w3_EFD[e]), as_float32(w2_EDF[e])
            x_ND, dy_ND = as_float32(x_RD[begin:end]), as_float32(dy_RD[begin:end])
            act_NF, d_gate_NF, d_up_NF = np.empty((3, end - begin, w1.shape[0]), np.float32)
            for rows in _blocks(begin, end):
                own = slice(rows.start - begin, rows.stop - begin)  # the rows inside the group
                gate, up = as_float32(gate_RF[rows]), as_float32(up_RF[rows])
                d_act = dy_ND[own] @ w2
                slope = sigmoid(gate)
                silu = gate * slope
                np.multiply(silu, up, out=act_NF[own])
                np.multiply(silu, d_act, out=d_up_NF[own])
                # d silu / d gate = sigmoid + silu (1 - sigmoid)
                silu *= 1.0 - slope
                silu += slope
                silu *= up
                np.multiply(silu, d_act, out=d_gate_NF[own])
                dx_RD[rows] = d_gate_NF[own] @ w1 + d_up_NF[own] @ w3
            dw1_EFD[e] = d_gate_NF.T @ x_ND
            dw3_EFD[e] = d_up_NF.T @ x_ND
            dw2_EDF[e] = dy_ND.T @ act_NF
    return dx_RD, dw1_EFD, dw3_EFD, dw2_EDF


def groups(sizes_E: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end of rows) of every group that has rows."""
    end = 0
    for expert, size in enumerate(sizes_E.tolist()):
        begin, end = end, end + size
        if size:
            yield expert, begin, end


def _blocks(begin: int, end: int) -> Iterator[slice]:
    for first in range(begin, end, _ROW_BLOCK):
        yield slice(first, min(first + _ROW_BLOCK, end))


def as_float32(values: np.ndarray) -> np.ndarray:
    """The values in float32: numpy multiplies float16 matrices without BLAS."""
    return values.astype(np.float32, copy=False)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    result = np.negative(x)
    np.exp(result, out=result)
    result += 1.0
    return np.reciprocal(result, out=result)
