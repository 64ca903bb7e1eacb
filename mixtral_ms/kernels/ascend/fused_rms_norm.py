"""Root mean square norm by Ascend's fused operators."""

import mindspore
from mindspore import Tensor, nn, ops


class FusedRMSNorm(nn.Cell):
    """`ops.rms_norm`; the sum of squares is float32 inside the kernel.

    Args:
        eps: added to the mean square.
        dtype: that input and weight are cast to, as the operator takes one dtype; None for the
            input's own. In 16 bit the weight is rounded too.
    """

    def __init__(self, eps: float, dtype: mindspore.Type | None = None) -> None:
        super().__init__()
        self.eps, self.dtype = eps, dtype

    def construct(self, x: Tensor, weight_D: Tensor) -> Tensor:
        """Normalises the last axis."""
        dtype = x.dtype if self.dtype is None else self.dtype
        normed = ops.rms_norm(ops.cast(x, dtype), ops.cast(weight_D, dtype), self.eps)[0]
        return ops.cast(normed, x.dtype)
