"""Dense layer with MindFormers' parameter names and (out, in) weights."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype


def empty_parameter(name: str, *shape: int) -> Parameter:
    """A float32 parameter of zeros, filled later by model/initialize.py or a checkpoint.

    `Tensor(array)` would keep a copy on the host beside the one the graph uses.
    """
    return Parameter(Tensor.from_numpy(np.zeros(shape, np.float32)), name=name)


class Linear(nn.Cell):
    """y = x W^T + b in the compute dtype.

    Args:
        inputs: size of x's last axis.
        outputs: size of y's last axis.
        bias: whether there is b.
        compute_dtype: dtype that x and W are cast to; y has it too.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        compute_dtype: mstype.Type = mstype.float32,
    ) -> None:
        super().__init__()
        self.outputs, self.compute_dtype = outputs, compute_dtype
        self.weight = empty_parameter("weight", outputs, inputs)
        self.bias = empty_parameter("bias", outputs) if bias else None
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        """Maps (..., inputs) to (..., outputs)."""
        return self.with_bias(self.products(x))

    def products(self, x: Tensor) -> Tensor:
        """x W^T; where ranks split the inputs, the bias comes after their sum."""
        shape = x.shape
        x = ops.reshape(ops.cast(x, self.compute_dtype), (-1, shape[-1]))
        return ops.reshape(self.flat_products(x), shape[:-1] + (self.outputs,))

    def flat_products(self, x: Tensor) -> Tensor:
        """x W^T of (N, inputs)."""
        return self.product(x, ops.cast(self.weight, self.compute_dtype))

    def with_bias(self, y: Tensor) -> Tensor:
        """y + b."""
        return y if self.bias is None else y + ops.cast(self.bias, self.compute_dtype)
