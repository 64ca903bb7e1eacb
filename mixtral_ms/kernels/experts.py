"""The expert SwiGLU networks over rows grouped by expert: plain, blocked and native.

Legend: R rows, D hidden, F intermediate, E experts, C capacity, N blocks.
Each cell says how it wants its rows laid out (`layout`, read by model/dispatch.py):
  packed   groups follow each other without gaps;
  blocked  each group starts at a multiple of `block`;
  padded   each group has C rows, used or not.
"""

from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.elementwise import swiglu
from mixtral_ms.kernels.native import custom

BLOCK = 64


class PaddedExperts(nn.Cell):
    """Experts of equal capacity as one batched matrix product."""

    layout = "padded"

    def __init__(self) -> None:
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(
        self, x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, sizes_E: Tensor
    ) -> Tensor:
        """R = E * C; rows past a group's size give what their input gives."""
        experts, _, hidden = w1_EFD.shape
        x_ECD = ops.reshape(x_RD, (experts, -1, hidden))
        act_ECF = swiglu(self.product(x_ECD, w1_EFD), self.product(x_ECD, w3_EFD))
        return ops.reshape(self.product(act_ECF, w2_EDF), (-1, hidden))


class BlockedExperts(nn.Cell):
    """Dropless experts in plain operators: blocks of rows, each with its expert's weights.

    Static shapes whatever the routing: a group is rounded up to whole blocks, so that at most
    E blocks are padding.
    """

    layout = "blocked"

    def __init__(self) -> None:
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(
        self, x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, sizes_E: Tensor
    ) -> Tensor:
        """R is a multiple of BLOCK; rows past a group's size give what their input gives."""
        hidden = x_RD.shape[-1]
        blocks = x_RD.shape[0] // BLOCK
        ends_E = ops.cumsum((sizes_E + (BLOCK - 1)) // BLOCK, 0)
        index_N1 = ops.reshape(ops.arange(0, blocks, 1, dtype=mstype.int32), (blocks, 1))
        passed_NE = ops.cast(index_N1 >= ops.expand_dims(ends_E, 0), mstype.int32)
        # Blocks past the last group take the last expert: their rows are never read.
        last = w1_EFD.shape[0] - 1
        expert_N = ops.minimum(ops.sum(passed_NE, 1), Tensor(last, mstype.int32))
        x = ops.reshape(x_RD, (blocks, BLOCK, hidden))
        gate = self.product(x, ops.gather(w1_EFD, expert_N, 0))
        up = self.product(x, ops.gather(w3_EFD, expert_N, 0))
        out = self.product(swiglu(gate, up), ops.gather(w2_EDF, expert_N, 0))
        return ops.reshape(out, (-1, hidden))


class NativeExperts(nn.Cell):
    """Experts by the C++ kernels: only used rows are computed (float32)."""

    layout = "packed"

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.network = _NativeNetwork(library)

    def construct(
        self, x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, sizes_E: Tensor
    ) -> Tensor:
        """Rows past the groups give zero."""
        return self.network(x_RD, w1_EFD, w3_EFD, w2_EDF, sizes_E)[0]


class _NativeNetwork(nn.Cell):
    def __init__(self, library: Path) -> None:
        super().__init__()
        self.forward = custom.expert_ffn_forward(library)
        self.backward = custom.expert_ffn_backward(library)

    def construct(
        self, x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, sizes_E: Tensor
    ) -> tuple:
        return self.forward(x_RD, w1_EFD, w3_EFD, w2_EDF, sizes_E)

    def bprop(  # noqa: PLR0913 - MindSpore's signature: inputs, outputs, their gradients
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        sizes_E: Tensor,
        out: tuple,
        dout: tuple,
    ) -> tuple:
        _, gate_RF, up_RF = out
        dx, dw1, dw3, dw2 = self.backward(
            x_RD, w1_EFD, w3_EFD, w2_EDF, sizes_E, gate_RF, up_RF, dout[0]
        )
        return dx, dw1, dw3, dw2, ops.zeros_like(sizes_E)
