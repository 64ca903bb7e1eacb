"""The experts' SwiGLU networks over tokens grouped by expert, in numpy: nothing is padded.

MindSpore runs both functions as `ops.Custom` operators on the CPU. Groups have sizes that are known
only when they run, for which MindSpore itself would pad them and gather a weight for each block.

Legend: R slots sorted by expert, D hidden, F intermediate, E experts.
"""

from collections.abc import Callable, Iterator

import numpy as np

from mixtral_ms.kernels.threaded.parallel_blocks import empty, matmul, parallel_for
from mixtral_ms.kernels.threaded.saved_activations import NO_TICKET, Kept

_TOKEN_BLOCK = 128  # tokens whose activations stay in the cache between two products
_WEIGHT_BLOCK = 1024  # columns of F per task: narrower products are a third slower

_Three = tuple[np.ndarray, np.ndarray, np.ndarray]


class InPlaceExperts:
    """`forward` and `backward` on weights where they lie, in float32; gate and up stay here.

    Args:
        read: gives w1, w3 and w2.
        keeping: whether a forward is to keep gate and up; a backward computes what was not kept.
    """

    def __init__(self, read: Callable[[], _Three], keeping: Callable[[], bool]) -> None:
        self.read, self.keeping, self.kept = read, keeping, Kept()

    def forward(
        self, x_RD: np.ndarray, tokens_per_expert_E: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns y (R, D) and the backward's ticket (1)."""
        self.kept.drop()
        y_RD, gate_RF, up_RF = numpy_experts_forward(x_RD, *self.read(), tokens_per_expert_E)
        return y_RD, self.kept.keep(gate_RF, up_RF) if self.keeping() else NO_TICKET

    def backward(
        self,
        x_RD: np.ndarray,
        tokens_per_expert_E: np.ndarray,
        ticket: np.ndarray,
        dy_RD: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """Returns dx, dw1, dw3, dw2, shaped as x and the weights."""
        weights, inner = self.read(), self.kept.take(ticket)
        if inner is None:
            inner = numpy_experts_forward(x_RD, *weights, tokens_per_expert_E)[1:]
        return numpy_experts_backward(x_RD, *weights, tokens_per_expert_E, *inner, dy_RD)


def numpy_experts_forward(
    x_RD: np.ndarray,
    w1_EFD: np.ndarray,
    w3_EFD: np.ndarray,
    w2_EDF: np.ndarray,
    tokens_per_expert_E: np.ndarray,
) -> _Three:
    """Returns y (R, D), gate (R, F), up (R, F) in x's dtype; slots past the groups are 0 in y."""
    dtype = x_RD.dtype
    x_RD, w1_EFD, w3_EFD, w2_EDF = (as_float32(value) for value in (x_RD, w1_EFD, w3_EFD, w2_EDF))
    slots, intermediate = len(x_RD), w1_EFD.shape[1]
    y_RD = empty(*x_RD.shape)
    gate_RF, up_RF = empty(slots, intermediate), empty(slots, intermediate)

    def block(task: tuple[int, slice]) -> None:
        e, own = task
        gate = matmul(x_RD[own], w1_EFD[e].T, gate_RF[own])
        up = matmul(x_RD[own], w3_EFD[e].T, up_RF[own])
        act = np.negative(gate, out=np.empty_like(gate))
        np.exp(act, out=act)
        act += 1.0
        np.divide(gate, act, out=act)
        act *= up
        matmul(act, w2_EDF[e].T, y_RD[own])

    parallel_for(block, _token_blocks(tokens_per_expert_E))
    used = int(tokens_per_expert_E.sum())
    for value in (y_RD, gate_RF, up_RF):
        value[used:] = 0.0
    return (
        y_RD.astype(dtype, copy=False),
        gate_RF.astype(dtype, copy=False),
        up_RF.astype(dtype, copy=False),
    )


def numpy_experts_backward(  # noqa: PLR0913, PLR0917 - the operator's inputs
    x_RD: np.ndarray,
    w1_EFD: np.ndarray,
    w3_EFD: np.ndarray,
    w2_EDF: np.ndarray,
    tokens_per_expert_E: np.ndarray,
    gate_RF: np.ndarray,
    up_RF: np.ndarray,
    dy_RD: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Returns dx, dw1, dw3, dw2, shaped as x and the weights."""
    dtype = x_RD.dtype
    x_RD, w1_EFD, w3_EFD, w2_EDF, gate_RF, up_RF, dy_RD = (
        as_float32(value) for value in (x_RD, w1_EFD, w3_EFD, w2_EDF, gate_RF, up_RF, dy_RD)
    )
    dx_RD = empty(*x_RD.shape)
    act_RF, d_gate_RF, d_up_RF = (empty(*gate_RF.shape) for _ in range(3))

    def block(task: tuple[int, slice]) -> None:
        e, own = task
        d_act = matmul(dy_RD[own], w2_EDF[e], np.empty_like(gate_RF[own]))
        _swiglu_backward(gate_RF[own], up_RF[own], d_act, act_RF[own], d_gate_RF[own], d_up_RF[own])
        matmul(d_gate_RF[own], w1_EFD[e], dx_RD[own])
        matmul(d_up_RF[own], w3_EFD[e], dx_RD[own], add=True)

    parallel_for(block, _token_blocks(tokens_per_expert_E))
    dx_RD[int(tokens_per_expert_E.sum()) :] = 0.0

    dw1_EFD, dw3_EFD, dw2_EDF = (empty(*w.shape) for w in (w1_EFD, w3_EFD, w2_EDF))

    def weight_block(task: tuple[int, slice, slice]) -> None:
        e, group, columns = task
        matmul(d_gate_RF[group, columns].T, x_RD[group], dw1_EFD[e, columns])
        matmul(d_up_RF[group, columns].T, x_RD[group], dw3_EFD[e, columns])
        matmul(dy_RD[group].T, act_RF[group, columns], dw2_EDF[e, :, columns])

    parallel_for(weight_block, _weight_blocks(tokens_per_expert_E, gate_RF.shape[1]))
    return tuple(x.astype(dtype, copy=False) for x in (dx_RD, dw1_EFD, dw3_EFD, dw2_EDF))


def _swiglu_backward(  # noqa: PLR0913, PLR0917 - three values and three gradients
    gate: np.ndarray,
    up: np.ndarray,
    d_out: np.ndarray,
    out: np.ndarray,
    d_gate: np.ndarray,
    d_up: np.ndarray,
) -> None:
    """out = silu(gate) up and the gradients of gate and up; out first holds other values."""
    slope = sigmoid(gate)
    silu = np.multiply(gate, slope, out=out)
    np.multiply(silu, d_out, out=d_up)
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    np.subtract(1.0, slope, out=d_gate)
    d_gate *= silu
    d_gate += slope
    d_gate *= up
    d_gate *= d_out
    silu *= up


def expert_groups(tokens_per_expert_E: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(expert, first slot, end of its slots) of every expert that has tokens."""
    end = 0
    for expert, size in enumerate(tokens_per_expert_E.tolist()):
        begin, end = end, end + size
        if size:
            yield expert, begin, end


def _token_blocks(tokens_per_expert_E: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Blocks of equal size, rather than full ones and a small rest, balance the threads."""
    for expert, begin, end in expert_groups(tokens_per_expert_E):
        count = -(-(end - begin) // _TOKEN_BLOCK)
        for i in range(count):
            first, last = ((end - begin) * j // count for j in (i, i + 1))
            yield expert, slice(begin + first, begin + last)


def _weight_blocks(
    tokens_per_expert_E: np.ndarray, intermediate: int
) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its slots, some of the columns); one without tokens has an empty product: 0."""
    end, count = 0, -(-intermediate // _WEIGHT_BLOCK)
    for expert, size in enumerate(tokens_per_expert_E.tolist()):
        begin, end = end, end + size
        for i in range(count):
            first, last = (intermediate * j // count for j in (i, i + 1))
            yield expert, slice(begin, end), slice(first, last)


def as_float32(values: np.ndarray) -> np.ndarray:
    """The values in float32: numpy multiplies float16 matrices without BLAS."""
    return values.astype(np.float32, copy=False)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    result = np.negative(x)
    np.exp(result, out=result)
    result += 1.0
    return np.reciprocal(result, out=result)
