"""RMSNorm and softmax cross entropy in numpy, block by block in the cache.

Legend: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np

from mixtral_ms.kernels.threaded.parallel_blocks import empty, parallel_for

_BLOCK = 1 << 15  # values of one block: several such arrays fit into a core's cache


def numpy_rms_norm_forward(
    x_TD: np.ndarray, weight_D: np.ndarray, eps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns y (T, D) and the inverse root mean square (T)."""
    y_TD, inverse_T = empty(*x_TD.shape), np.empty(len(x_TD), np.float32)

    def block(rows: slice) -> None:
        x, y, inverse = x_TD[rows], y_TD[rows], inverse_T[rows]
        np.einsum("td,td->t", x, x, out=inverse)
        inverse /= x.shape[1]
        inverse += eps
        np.sqrt(inverse, out=inverse)
        np.reciprocal(inverse, out=inverse)
        np.multiply(x, inverse[:, None], out=y)
        y *= weight_D

    parallel_for(block, _row_blocks(x_TD))
    return y_TD, inverse_T


def numpy_rms_norm_backward(
    x_TD: np.ndarray, weight_D: np.ndarray, inverse_T: np.ndarray, dy_TD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns dx (T, D) and d_weight (D)."""
    dx_TD = empty(*x_TD.shape)
    blocks = list(_row_blocks(x_TD))
    # A sum for each block, added in one order, gives the same bits whatever the thread count.
    sums = np.empty((len(blocks), x_TD.shape[1]), np.float32)

    def block(task: tuple[int, slice]) -> None:
        i, rows = task
        x, dy, dx, inverse = x_TD[rows], dy_TD[rows], dx_TD[rows], inverse_T[rows]
        np.multiply(x, inverse[:, None], out=dx)  # normalised
        np.einsum("td,td->d", dx, dy, out=sums[i])
        weighted = dy * weight_D
        back = np.einsum("td,td->t", weighted, dx)
        back /= x.shape[1]
        dx *= back[:, None]
        np.subtract(weighted, dx, out=dx)
        dx *= inverse[:, None]

    parallel_for(block, enumerate(blocks))
    return dx_TD, sums.sum(0)


def numpy_softmax_cross_entropy(
    logits_TV: np.ndarray, labels_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns loss (T) and d_logits (T, V), both zero where the label is negative.

    The gradients take the logits' memory: MindSpore gives an operator a copy.
    """
    loss_T = np.empty(len(logits_TV), np.float32)

    def block(rows: slice) -> None:
        x, labels = logits_TV[rows], labels_T[rows]
        x -= x.max(1, keepdims=True)
        at = np.arange(len(x)), np.maximum(labels, 0)
        picked = x[at]
        np.exp(x, out=x)
        total = x.sum(1)
        np.subtract(np.log(total), picked, out=loss_T[rows])
        x /= total[:, None]
        x[at] -= 1.0
        x[labels < 0] = 0.0
        loss_T[rows][labels < 0] = 0.0

    parallel_for(block, _row_blocks(logits_TV))
    return loss_T, logits_TV


def _row_blocks(x: np.ndarray) -> Iterator[slice]:
    """Rows of x that make a block."""
    size = max(1, _BLOCK // x.shape[1])
    for begin in range(0, len(x), size):
        yield slice(begin, min(begin + size, len(x)))
