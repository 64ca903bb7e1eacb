"""The summed cross entropy of hidden states under a head's weight, and its gradients, in numpy.

Logits exist for a chunk of supervised tokens at a time, in tiles of some columns. A tile's
exponentials are taken from its own peak while it is in the cache, right after its product; the
peaks of all tiles then give each a factor that makes them probabilities, which a second pass puts
in, right before the products of the gradients.

Legend: T tokens, N supervised tokens of a chunk, D hidden, V vocabulary, C tiles, W columns of one.
"""

from collections.abc import Callable

import numpy as np

from mixtral_ms.kernels.threaded.parallel_blocks import empty, matmul, parallel_for
from mixtral_ms.kernels.threaded.saved_activations import NO_TICKET, Kept

_CHUNK_VALUES = 1 << 24  # logits held at once: 64 MB
# Of a tile, at most. Narrower products, or rows a power of two apart, are a third slower.
_ROWS, _COLUMNS = 512, 784
_SUMS = 16  # partial sums of hidden's gradient: a fixed number, whatever the thread count


class InPlaceCrossEntropy:
    """Forward and backward on a weight where it lies.

    Args:
        read: gives the weight (V, D).
        keeping: whether a forward is to compute the gradients, where logits are at hand, and to
            keep them; a backward computes what was not kept.
    """

    def __init__(self, read: Callable[[], np.ndarray], keeping: Callable[[], bool]) -> None:
        self.read, self.keeping, self.kept = read, keeping, Kept()

    def forward(self, hidden_TD: np.ndarray, labels_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the summed loss (1) and the backward's ticket (1)."""
        self.kept.drop()
        if not self.keeping():
            return loss(hidden_TD, self.read(), labels_T), NO_TICKET
        total, d_hidden_TD, d_weight_VD = loss_and_gradients(hidden_TD, self.read(), labels_T)
        return total, self.kept.keep(d_hidden_TD, d_weight_VD)

    def backward(
        self, hidden_TD: np.ndarray, labels_T: np.ndarray, ticket: np.ndarray, factor: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the gradients of hidden (T, D) and of the weight (V, D), times factor (1)."""
        gradients = self.kept.take(ticket)
        if gradients is None:
            gradients = loss_and_gradients(hidden_TD, self.read(), labels_T)[1:]
        for gradient in gradients:
            _scale(gradient, factor)
        return gradients


@np.errstate(all="ignore")  # what overflows is infinite, and the overflow check sees it
def loss(hidden_TD: np.ndarray, weight_VD: np.ndarray, labels_T: np.ndarray) -> np.ndarray:
    """The summed loss (1) of tokens without a negative label."""
    total = 0.0
    for tokens in _chunks(labels_T, len(weight_VD)):
        total += _Softmax(hidden_TD[tokens], weight_VD, labels_T[tokens], keep=False).loss
    return np.array([total], np.float32)


@np.errstate(all="ignore")
def loss_and_gradients(
    hidden_TD: np.ndarray, weight_VD: np.ndarray, labels_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `loss`, with the gradients of hidden and of the weight."""
    d_hidden_TD, d_weight_VD = np.zeros_like(hidden_TD), empty(*weight_VD.shape)
    total, chunks = 0.0, _chunks(labels_T, len(weight_VD))

    def chunk(tokens: np.ndarray) -> float:
        """A function of its own, so that its logits' memory is free for the next one's."""
        softmax = _Softmax(hidden_TD[tokens], weight_VD, labels_T[tokens], keep=True)
        d_hidden_TD[tokens] = softmax.backward(d_weight_VD, add=tokens is not chunks[0])
        return softmax.loss

    for tokens in chunks:
        total += chunk(tokens)
    if not chunks:
        d_weight_VD[:] = 0.0
    return np.array([total], np.float32), d_hidden_TD, d_weight_VD


def _chunks(labels_T: np.ndarray, vocabulary: int) -> list[np.ndarray]:
    """Places of supervised tokens, in chunks of equal size; nobody needs the other tokens' logits.

    Raises:
        IndexError: a label is not in the vocabulary.
    """
    supervised = np.flatnonzero(labels_T >= 0)
    if len(supervised) == 0:
        return []
    if labels_T.max() >= vocabulary:
        raise IndexError(f"label {labels_T.max()} in a vocabulary of {vocabulary}")
    size = max(1, min(_ROWS, _CHUNK_VALUES // vocabulary))
    return np.array_split(supervised, -(-len(supervised) // size))


class _Softmax:
    """Softmax of the logits of a chunk, and its summed loss.

    Args:
        hidden_ND: hidden states.
        weight_VD: the head's weight.
        labels_N: labels, none of them negative.
        keep: whether `backward` will be called.
    """

    def __init__(
        self, hidden_ND: np.ndarray, weight_VD: np.ndarray, labels_N: np.ndarray, *, keep: bool
    ) -> None:
        self.hidden_ND, self.weight_VD, self.labels_N = hidden_ND, weight_VD, labels_N
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        self.columns = [
            slice(first, min(first + _COLUMNS, vocabulary))
            for first in range(0, vocabulary, _COLUMNS)
        ]
        self._values = empty(tokens * vocabulary) if keep else None
        peaks_CN, sums_CN = (np.empty((len(self.columns), tokens), np.float32) for _ in range(2))
        picked_N = np.empty(tokens, np.float32)

        def exponentials(c: int) -> None:
            x_NW = self._tile(c)
            matmul(hidden_ND, weight_VD[self.columns[c]].T, x_NW)
            rows, at = self._own(c)
            picked_N[rows] = x_NW[rows, at]
            peak_N = x_NW.max(1, out=peaks_CN[c])
            x_NW -= peak_N[:, None]
            np.exp(x_NW, out=x_NW)
            x_NW.sum(1, out=sums_CN[c])

        parallel_for(exponentials, range(len(self.columns)))
        peak_N = peaks_CN.max(0)
        factors_CN = np.exp(peaks_CN - peak_N)
        total_N = (sums_CN * factors_CN).sum(0, dtype=np.float64)
        self._factors_CN = factors_CN / total_N.astype(np.float32)
        self.loss = float((np.log(total_N) + (peak_N - picked_N)).sum())

    def backward(self, d_weight_VD: np.ndarray, *, add: bool) -> np.ndarray:
        """Returns the gradient of hidden (N, D); that of the weight is put in place or added."""
        groups = np.array_split(np.arange(len(self.columns)), min(_SUMS, len(self.columns)))
        sums = empty(len(groups), *self.hidden_ND.shape)

        def gradients(g: int) -> None:
            for c in groups[g].tolist():
                x_NW = self._tile(c)
                x_NW *= self._factors_CN[c][:, None]
                x_NW[self._own(c)] -= 1.0
                columns = self.columns[c]
                matmul(x_NW.T, self.hidden_ND, d_weight_VD[columns], add=add)
                matmul(x_NW, self.weight_VD[columns], sums[g], add=c > groups[g][0])

        parallel_for(gradients, range(len(groups)))
        return sums.sum(0)

    def _tile(self, c: int) -> np.ndarray:
        """Memory of a tile; the same at each call if it is kept."""
        tokens, columns = len(self.hidden_ND), self.columns[c]
        if self._values is None:
            return empty(tokens, columns.stop - columns.start)
        return self._values[tokens * columns.start : tokens * columns.stop].reshape(tokens, -1)

    def _own(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose label is in a tile, and its column there."""
        columns = self.columns[c]
        rows = np.flatnonzero((self.labels_N >= columns.start) & (self.labels_N < columns.stop))
        return rows, self.labels_N[rows] - columns.start


def _scale(x: np.ndarray, factor: np.ndarray) -> None:
    """x *= factor, in blocks."""

    def block(rows: slice) -> None:
        x[rows] *= factor

    parallel_for(block, [slice(i, i + _ROWS) for i in range(0, len(x), _ROWS)])
