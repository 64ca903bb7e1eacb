"""AdamW as one operator for each tensor, aclnnApplyAdamWV2."""

from collections.abc import Sequence

from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import AdamW

from mixtral_ms.kernels.cells.optimizer_update import PlainUpdate

_NO_BIAS_LEFT = 1e9  # a power of beta that is zero in float32, whether it is this one or the next


class FusedUpdate(PlainUpdate):
    """Reads and writes parameter, moments and gradient once, and takes its rates from the host.

    The operator corrects the bias of the moments by beta to the power of `step`, of which its
    documentation does not say where it begins: so large a step asks for no correction, and the
    rates are what `PlainUpdate` is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operator = AdamW()
        self._step = Tensor([_NO_BIAS_LEFT], mstype.float32)

    def adamw(
        self,
        parameter: Parameter,
        moments: tuple[Parameter, Parameter],
        gradient: Tensor,
        rates: Sequence[float],
    ) -> None:
        """As `PlainUpdate.adamw`."""
        rate, beta1, beta2, eps, decay, scale = rates
        scaled = gradient if scale == 1.0 else gradient * scale
        first, second = moments
        # without amsgrad the third moment is not read; MindSpore's own optimizer gives the second
        self.operator(
            parameter, first, second, second, scaled, self._step, rate, beta1, beta2, decay, eps
        )
