"""RMSNorm as cells: plain operators, or one kernel of C++ or numpy each way.

Legend: T tokens, D hidden.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.elementwise import rms_norm
from mixtral_ms.kernels.native import custom_ops


class PlainRMSNorm(nn.Cell):
    """`elementwise.rms_norm` with a fixed eps."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor, weight_D: Tensor) -> Tensor:
        """Normalises the last axis."""
        return rms_norm(x, weight_D, self.eps)


class NativeRMSNorm(nn.Cell):
    """The same in C++ or numpy (float32), which keep one value a row."""

    def __init__(self, library: custom_ops.Library, eps: float) -> None:
        super().__init__()
        self.norm = _NativeNorm(library, eps)

    def construct(self, x: Tensor, weight_D: Tensor) -> Tensor:
        """Normalises the last axis."""
        # The residual stream may be narrower than the compute dtype; the kernel reads float32.
        x_TD = ops.cast(ops.reshape(x, (-1, x.shape[-1])), mstype.float32)
        return ops.cast(ops.reshape(self.norm(x_TD, weight_D)[0], x.shape), x.dtype)


class _NativeNorm(nn.Cell):
    def __init__(self, library: custom_ops.Library, eps: float) -> None:
        super().__init__()
        self.forward = custom_ops.rms_norm_forward(library)
        self.backward = custom_ops.rms_norm_backward(library)
        self.eps = Tensor([eps], mstype.float32)

    def construct(self, x_TD: Tensor, weight_D: Tensor) -> tuple:
        return self.forward(x_TD, weight_D, self.eps)

    def bprop(self, x_TD: Tensor, weight_D: Tensor, out: tuple, dout: tuple) -> tuple:
        return self.backward(x_TD, weight_D, out[1], dout[0])
