"""What an optimizer step does to one tensor, operator by operator: AdamW and sums of squares."""

from collections.abc import Sequence
from pathlib import Path

from mindspore import Parameter, Tensor, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.native import custom


class PlainUpdate:
    """By MindSpore's own operators."""

    def __init__(self) -> None:
        self._fused = ops.AdamWeightDecay()

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
        *others, scale = rates
        # Multiplying by exactly 1 would still read and write every gradient once more.
        scaled = gradient if scale == 1.0 else gradient * scale
        values = [Tensor(rate, mstype.float32) for rate in others]
        self._fused(parameter, *moments, *values, scaled)

    def sum_of_squares(self, x: Tensor) -> float:
        """Sum over all values of x squared.

        Axis by axis: `ops.L2Loss` adds one value after the other in float32, which is a thousandth
        off for four million of them.
        """
        return float(ops.sum(ops.sum(ops.square(x), -1)))


class NativeUpdate:
    """The same in C++ (float32), one pass over the memory each."""

    def __init__(self, library: Path) -> None:
        self._adamw = custom.adamw(library)
        self._sum_of_squares = custom.sum_of_squares(library)

    def adamw(
        self,
        parameter: Parameter,
        moments: tuple[Parameter, Parameter],
        gradient: Tensor,
        rates: Sequence[float],
    ) -> None:
        """As `PlainUpdate.adamw`."""
        self._adamw(parameter, *moments, gradient, Tensor(list(rates), mstype.float32))

    def sum_of_squares(self, x: Tensor) -> float:
        """As `PlainUpdate.sum_of_squares`, in float64."""
        return float(self._sum_of_squares(x)[0])
