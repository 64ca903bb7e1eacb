"""Experts by Ascend's products and its fused SwiGLU.

Legend: R slots, D hidden, F intermediate, E experts, C capacity.
"""

from mindspore import Tensor, mint, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import GroupedMatmul

from mixtral_ms.kernels.cells.elementwise import swiglu
from mixtral_ms.kernels.cells.experts import Experts


class FusedGate(nn.Cell):
    """silu(x W1^T) * (x W3^T) by Ascend's operator, which wants gate and up behind each other.

    What is copied for that is the smaller: the weights, or the products of more rows than a weight
    has columns. The joined weights are joined again in the backward pass, not kept.

    Args:
        product: x, weight (E, outputs, inputs), counts -> x weight^T of each expert.
    """

    def __init__(self, product: nn.Cell) -> None:
        super().__init__()
        self.product = product
        self.join_weights = ops.Concat(1).recompute()
        self.join_columns = ops.Concat(-1)

    def construct(
        self, x: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, tokens_per_expert_E: Tensor
    ) -> Tensor:
        """x (R, D) or (E, C, D) -> (..., F)."""
        rows = 1
        for size in x.shape[:-1]:
            rows = rows * size
        if rows > w1_EFD.shape[0] * w1_EFD.shape[2]:
            weights = self.join_weights((w1_EFD, w3_EFD))
            both = self.product(x, weights, tokens_per_expert_E)
        else:
            gate = self.product(x, w1_EFD, tokens_per_expert_E)
            both = self.join_columns((gate, self.product(x, w3_EFD, tokens_per_expert_E)))
        return ops.swiglu(both, -1)


class PlainGate(nn.Cell):
    """The same by operators of single steps."""

    def __init__(self, product: nn.Cell) -> None:
        super().__init__()
        self.product = product

    def construct(
        self, x: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, tokens_per_expert_E: Tensor
    ) -> Tensor:
        """As `FusedGate`."""
        gate = self.product(x, w1_EFD, tokens_per_expert_E)
        return swiglu(gate, self.product(x, w3_EFD, tokens_per_expert_E))


class GroupedExperts(Experts):
    """Experts of any number of tokens by the grouped matrix product.

    Args:
        fused: whether SwiGLU is one operator.
    """

    layout = "packed"

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.product = _GroupedProduct()
        self.gate = FusedGate(self.product) if fused else PlainGate(self.product)

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Slots past the groups are not written by the kernel, and nothing reads them."""
        ends_E = ops.cast(ops.cumsum(tokens_per_expert_E, 0), mstype.int64)
        return self.product(self.gate(x_RD, w1_EFD, w3_EFD, ends_E), w2_EDF, ends_E)


class BatchedExperts(Experts):
    """Experts of equal capacity as one batched product, with the fused SwiGLU."""

    layout = "padded"

    def __init__(self) -> None:
        super().__init__()
        self.product = _BatchedProduct()
        self.gate = FusedGate(self.product)

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """As `cells.experts.PaddedExperts`."""
        experts, _, hidden = w1_EFD.shape
        x_ECD = ops.reshape(x_RD, (experts, -1, hidden))
        act_ECF = self.gate(x_ECD, w1_EFD, w3_EFD, tokens_per_expert_E)
        return ops.reshape(self.product(act_ECF, w2_EDF, tokens_per_expert_E), (-1, hidden))


class _GroupedProduct(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.product = GroupedMatmul(split_item=3, group_type=0)

    def construct(self, x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        # a view: the operator takes a transposed weight as it lies, and ops.transpose copies it
        transposed = mint.transpose(weight, 1, 2)
        return self.product([x], [transposed], None, None, None, None, None, ends_E)[0]


class _BatchedProduct(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(self, x_ECD: Tensor, weight: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        return self.product(x_ECD, weight)
