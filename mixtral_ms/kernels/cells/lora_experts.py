"""Experts whose weights are frozen and may have low-rank adapters (LoRA, arXiv 2106.09685).

Each weight W has an adapter A, B, of which it is x W^T + scale * dropout(x) A^T B^T, or (1,) zeros
in place of both. Nothing as large as a weight is computed, forwards or backwards.

Legend: R slots sorted by expert, D hidden, F intermediate, E experts, r rank, N of one group.
"""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells.experts import Experts
from mixtral_ms.kernels.threaded import numpy_lora_experts
from mixtral_ms.parallel.comm.graph_primitives import zeros_like


class LowRankExperts(Experts):
    """In numpy, on a CPU.

    Args:
        scale: of the adapters.
        dropout: part of an adapter's inputs that is dropped in training.
        salt: a number of this layer's own, so that layers drop different values.
    """

    layout = "packed"

    def __init__(self, scale: float, dropout: float, salt: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.no_key = Tensor(-1.0, mstype.float32)
        self.network = _LowRankNetwork(numpy_lora_experts.Kernel(scale, dropout, salt))
        if dropout > 0:
            self.lora_key = Parameter(
                Tensor(0, mstype.float32), name="lora_key", requires_grad=False
            )

    def construct(  # noqa: PLR0913, PLR0917 - weights and their adapters
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
        a1_ErD: Tensor,
        b1_EFr: Tensor,
        a3_ErD: Tensor,
        b3_EFr: Tensor,
        a2_ErF: Tensor,
        b2_EDr: Tensor,
    ) -> Tensor:
        """Slots past the groups give zero."""
        key = self.no_key
        if self.dropout > 0 and self.training:
            key = self.lora_key
        weights = (w1_EFD, w3_EFD, w2_EDF)
        adapters = (a1_ErD, b1_EFr, a3_ErD, b3_EFr, a2_ErF, b2_EDr)
        return self.network(x_RD, *weights, tokens_per_expert_E, key, *adapters)[0]


class _LowRankNetwork(nn.Cell):
    def __init__(self, kernel: numpy_lora_experts.Kernel) -> None:
        super().__init__()
        self.forward, self.backward = _forward(kernel), _backward(kernel)

    def construct(  # noqa: PLR0913, PLR0917
        self,
        x_RD: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        tokens_per_expert_E: Tensor,
        key: Tensor,
        a1: Tensor,
        b1: Tensor,
        a3: Tensor,
        b3: Tensor,
        a2: Tensor,
        b2: Tensor,
    ) -> tuple:
        return self.forward(x_RD, w1, w3, w2, tokens_per_expert_E, key, a1, b1, a3, b3, a2, b2)

    def bprop(  # noqa: PLR0913, PLR0917 - MindSpore's signature: inputs, outputs, their gradients
        self,
        x_RD: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        tokens_per_expert_E: Tensor,
        key: Tensor,
        a1: Tensor,
        b1: Tensor,
        a3: Tensor,
        b3: Tensor,
        a2: Tensor,
        b2: Tensor,
        out: tuple,
        dout: tuple,
    ) -> tuple:
        _, gate_RF, up_RF = out
        dx, da1, db1, da3, db3, da2, db2 = self.backward(
            x_RD,
            w1,
            w3,
            w2,
            tokens_per_expert_E,
            key,
            a1,
            b1,
            a3,
            b3,
            a2,
            b2,
            gate_RF,
            up_RF,
            dout[0],
        )
        frozen = (zeros_like(w1), zeros_like(w3), zeros_like(w2))  # nobody reads them
        others = (zeros_like(tokens_per_expert_E), zeros_like(key))
        return (dx, *frozen, *others, da1, db1, da3, db3, da2, db2)


def _forward(kernel: numpy_lora_experts.Kernel) -> ops.Custom:
    # MindSpore counts the operator's inputs by the function's parameters.
    def compute(x, w1, w3, w2, sizes, key, a1, b1, a3, b3, a2, b2):  # noqa: ANN001, ANN202, PLR0913, PLR0917
        return kernel.forward(x, w1, w3, w2, sizes, key, a1, b1, a3, b3, a2, b2)

    def shapes(x: list, w1: list, *_: list) -> tuple:
        return x, [x[0], w1[1]], [x[0], w1[1]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x

    return ops.Custom(compute, shapes, dtypes, "pyfunc")


def _backward(kernel: numpy_lora_experts.Kernel) -> ops.Custom:
    def compute(x, w1, w3, w2, sizes, key, a1, b1, a3, b3, a2, b2, gate, up, dy):  # noqa: ANN001, ANN202, PLR0913, PLR0917
        return kernel.backward(x, w1, w3, w2, sizes, key, a1, b1, a3, b3, a2, b2, gate, up, dy)

    def x_and_adapters(*inputs: object) -> tuple:
        return inputs[0], *inputs[6:12]

    return ops.Custom(compute, x_and_adapters, x_and_adapters, "pyfunc")


class MergedExperts(Experts):
    """With any backend's experts: adds scale * B A to the weights. It cannot drop inputs.

    Args:
        experts: the backend's.
        scale: of the adapters.
        adapted: which of w1, w3 and w2 have an adapter.
    """

    def __init__(self, experts: Experts, scale: float, adapted: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.experts, self.scale, self.adapted = experts, scale, adapted
        self.layout = experts.layout
        self.product = ops.BatchMatMul()

    def construct(  # noqa: PLR0913, PLR0917 - weights and their adapters
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
        a1_ErD: Tensor,
        b1_EFr: Tensor,
        a3_ErD: Tensor,
        b3_EFr: Tensor,
        a2_ErF: Tensor,
        b2_EDr: Tensor,
    ) -> Tensor:
        """As the backend's experts."""
        if self.adapted[0]:
            w1_EFD = self._merged(w1_EFD, a1_ErD, b1_EFr)
        if self.adapted[1]:
            w3_EFD = self._merged(w3_EFD, a3_ErD, b3_EFr)
        if self.adapted[2]:
            w2_EDF = self._merged(w2_EDF, a2_ErF, b2_EDr)
        return self.experts(x_RD, w1_EFD, w3_EFD, w2_EDF, tokens_per_expert_E)

    def _merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return weight + ops.cast(self.scale * self.product(b, a), weight.dtype)
