"""What an optimizer step does to one tensor, operator by operator: AdamW and sums of squares."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.native import custom_ops

# Values that one float32 sum may run over: few enough for its rounding, and for OpenBLAS to stay
# on one thread, as waking a second one costs more than the sum.
_SUM_BLOCK = 8192


class PlainUpdate:
    """By MindSpore's own operators, on any device."""

    def __init__(self) -> None:
        # On the CPU five times as fast as AdamWeightDecay.
        self._adam = ops.Adam()

    def adamw(
        self,
        parameter: Parameter,
        moments: tuple[Parameter, Parameter],
        gradient: Tensor,
        rates: Sequence[float],
    ) -> None:
        """Update a parameter and its two moments in place, without a bias correction.

        Args:
            parameter: float32.
            moments: first and second, of the parameter's shape.
            gradient: of the parameter's shape.
            rates: learning rate, beta1, beta2, eps, decay, scale of the gradient.
        """
        rate, beta1, beta2, eps, decay, scale = rates
        # Multiplying by exactly 1 would still read and write every gradient once more.
        scaled = gradient if scale == 1.0 else gradient * scale
        if decay:
            ops.assign_sub(parameter, parameter * (rate * decay))
        # Powers of beta of 0 say that no bias is left.
        values = [Tensor(value, mstype.float32) for value in (0.0, 0.0, rate, beta1, beta2, eps)]
        self._adam(parameter, *moments, *values, scaled)

    def squares(self, x: Tensor) -> Tensor:
        """Sum over all values of x squared, on the device.

        Axis by axis: `ops.L2Loss` adds one value after the other in float32, which is a thousandth
        off for four million of them.
        """
        return ops.sum(ops.sum(ops.square(x), -1))

    def sum_of_squares(self, x: Tensor) -> float:
        """The same, read by the host."""
        return float(self.squares(x))


class NumpyUpdate(PlainUpdate):
    """Sums where the values are: on the CPU, tensors and numpy's arrays share their memory."""

    def sum_of_squares(self, x: Tensor) -> float:
        """As `PlainUpdate.sum_of_squares`; blocks are added in float64."""
        values = x.asnumpy().reshape(-1)
        blocks = (values[i : i + _SUM_BLOCK] for i in range(0, values.size, _SUM_BLOCK))
        return sum(float(np.dot(block, block)) for block in blocks)


class NativeUpdate(NumpyUpdate):
    """AdamW in C++ (float32), with decay and scale in the same pass over the memory."""

    def __init__(self, library: Path) -> None:
        self._adamw = custom_ops.adamw(library)

    def adamw(
        self,
        parameter: Parameter,
        moments: tuple[Parameter, Parameter],
        gradient: Tensor,
        rates: Sequence[float],
    ) -> None:
        """As `PlainUpdate.adamw`."""
        self._adamw(parameter, *moments, gradient, Tensor(list(rates), mstype.float32))
