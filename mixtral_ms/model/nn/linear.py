"""Dense layer with MindFormers' parameter names and (out, in) weights."""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.parallel.comm.device import zero_parameter


class Linear(nn.Cell):
    """y = x W^T + b in the compute dtype.

    Args:
        inputs: size of x's last axis.
        outputs: size of y's last axis.
        bias: whether there is b.
        compute_dtype: dtype that x and W are cast to; y has it too.
        join: sums what ranks compute of x W^T, before b is added; None where it is complete.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        compute_dtype: mstype.Type = mstype.float32,
        join: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.compute_dtype = inputs, outputs, compute_dtype
        self.weight = zero_parameter("weight", outputs, inputs)
        self.bias = zero_parameter("bias", outputs) if bias else None
        self.join, self.complete = join, join is None and not bias
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        """Maps (..., inputs) to (..., outputs)."""
        y = self.products(ops.reshape(ops.cast(x, self.compute_dtype), (-1, self.inputs)))
        y = ops.reshape(y, x.shape[:-1] + (self.outputs,))
        return y if self.complete else self._completed(y)

    def products(self, x: Tensor) -> Tensor:
        """x W^T of (N, inputs)."""
        return self.product(x, ops.cast(self.weight, self.compute_dtype))

    def _completed(self, y: Tensor) -> Tensor:
        y = y if self.join is None else self.join(y)
        return y if self.bias is None else y + ops.cast(self.bias, self.compute_dtype)
