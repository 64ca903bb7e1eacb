"""Experts by Ascend's grouped matrix product.

Legend: R slots, D hidden, F intermediate, E experts.
"""

from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import GroupedMatmul

from mixtral_ms.kernels.cells.elementwise import swiglu
from mixtral_ms.kernels.cells.experts import Experts


class GroupedExperts(Experts):
    """Expert networks by the grouped matrix product; its weights are (E, inputs, outputs)."""

    layout = "packed"

    def __init__(self) -> None:
        super().__init__()
        self.product = GroupedMatmul(split_item=3, group_type=0)

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
        gate = self._grouped(x_RD, w1_EFD, ends_E)
        up = self._grouped(x_RD, w3_EFD, ends_E)
        return self._grouped(swiglu(gate, up), w2_EDF, ends_E)

    def _grouped(self, x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        # a view: the operator takes a transposed weight as it lies, and ops.transpose copies it
        transposed = mint.transpose(weight, 1, 2)
        return self.product([x], [transposed], None, None, None, None, None, ends_E)[0]
