"""Frozen experts with low-rank adapters in numpy: gradients of the tokens and the adapters alone.

Legend: R slots sorted by expert, D hidden, F intermediate, E experts, r rank, N of one group.
"""

from collections.abc import Iterator

import numpy as np

from mixtral_ms.kernels.threaded.numpy_experts import as_float32, expert_groups, sigmoid


class Kernel:
    """y = SwiGLU experts, each of whose weights W is x W^T + scale * dropout(x) A^T B^T.

    Args:
        scale: of the adapters.
        dropout: part of an adapter's inputs that is dropped.
        salt: a number of this layer's own, so that layers drop different values.
    """

    def __init__(self, scale: float, dropout: float, salt: int) -> None:
        self.scale, self.dropout, self.salt = np.float32(scale), dropout, salt

    def forward(self, x_RD: np.ndarray, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns y (R, D), gate (R, F), up (R, F); slots past the groups are zero.

        Args:
            x_RD: tokens, in the slots of their experts.
            inputs: w1 (E, F, D), w3 (E, F, D), w2 (E, D, F), sizes (E), key (a whole number; a
                negative one drops nothing), then A (E, r, in) and B (E, out, r) of each weight, or
                (1,) zeros for one without.
        """
        width = inputs[0].shape[1]
        y_RD = np.zeros_like(x_RD)
        gate_RF, up_RF = (np.zeros((len(x_RD), width), x_RD.dtype) for _ in range(2))
        with np.errstate(all="ignore"):  # what overflows is infinite, and the step sees it
            for own, gate_w, up_w, down_w in self._experts(*inputs):
                x = as_float32(x_RD[own])
                gate, up = gate_w.forward(x), up_w.forward(x)
                gate_RF[own], up_RF[own] = gate, up
                y_RD[own] = down_w.forward(gate * sigmoid(gate) * up)
        return y_RD, gate_RF, up_RF

    def backward(self, x_RD: np.ndarray, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns dx and the gradients of all A and B.

        Args:
            x_RD: tokens, in the slots of their experts.
            inputs: those of the forward, its gate and up, dy (R, D).
        """
        *given, gate_RF, up_RF, dy_RD = inputs
        dx_RD = np.zeros_like(x_RD)
        gradients = [np.zeros_like(one) for one in given[5:]]
        with np.errstate(all="ignore"):
            for own, gate_w, up_w, down_w in self._experts(*given):
                x, dy = as_float32(x_RD[own]), as_float32(dy_RD[own])
                gate, up = as_float32(gate_RF[own]), as_float32(up_RF[own])
                slope = sigmoid(gate)
                silu = gate * slope
                d_act = down_w.backward(silu * up, dy, gradients)
                # d silu / d gate = sigmoid + silu (1 - sigmoid)
                d_gate = d_act * up * (slope + silu * (1 - slope))
                dx_RD[own] = gate_w.backward(x, d_gate, gradients)
                dx_RD[own] += up_w.backward(x, d_act * silu, gradients)
        return dx_RD, *gradients

    def _experts(self, *inputs: np.ndarray) -> Iterator[tuple]:
        """Slots, and the three weights with their adapters, of every expert that has tokens."""
        weights, tokens_per_expert_E, key, adapters = (
            inputs[:3],
            inputs[3],
            int(inputs[4]),
            inputs[5:],
        )
        for expert, begin, end in expert_groups(tokens_per_expert_E):
            found = [
                _Weight(
                    as_float32(weight[expert]),
                    (adapters[2 * which], adapters[2 * which + 1]),
                    (expert, which),
                    self.scale,
                    self._mask(key, expert, which, (end - begin, weight.shape[2])),
                )
                for which, weight in enumerate(weights)
            ]
            yield slice(begin, end), *found

    def _mask(self, key: int, expert: int, which: int, shape: tuple[int, int]) -> np.ndarray | None:
        """What an adapter's inputs are multiplied by: a function of the key and of the salt."""
        if key < 0:
            return None
        salt = (self.salt << 32) + (expert << 8) + which
        generator = np.random.Generator(np.random.Philox(key=[key, salt]))
        kept = generator.random(shape, np.float32) >= self.dropout
        return kept / np.float32(1 - self.dropout)


class _Weight:
    """One expert's weight (out, in) and its adapter, if it has one."""

    def __init__(
        self,
        weight: np.ndarray,
        adapter: tuple[np.ndarray, np.ndarray],
        at: tuple[int, int],
        scale: np.float32,
        mask: np.ndarray | None,
    ) -> None:
        self.weight, self.scale, self.mask = weight, scale, mask
        self.expert, which = at
        self.slots = (2 * which, 2 * which + 1)
        self.adapted = adapter[0].ndim == 3
        if self.adapted:
            self.a, self.b = (as_float32(one[self.expert]) for one in adapter)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(N, in) -> (N, out)."""
        y = x @ self.weight.T
        if self.adapted:
            y += self.scale * (self._dropped(x) @ self.a.T) @ self.b.T
        return y

    def backward(self, x: np.ndarray, dy: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
        """The gradient of x; writes those of A and B."""
        dx = dy @ self.weight
        if self.adapted:
            kept, d_low = self._dropped(x), self.scale * (dy @ self.b)
            into_a, into_b = (gradients[slot] for slot in self.slots)
            into_a[self.expert] = d_low.T @ kept
            into_b[self.expert] = self.scale * dy.T @ (kept @ self.a.T)
            dx += self._dropped(d_low @ self.a)
        return dx

    def _dropped(self, x: np.ndarray) -> np.ndarray:
        return x if self.mask is None else x * self.mask
