"""The expert SwiGLU networks over tokens grouped by expert.

Legend: R slots, D hidden, F intermediate, E experts, C capacity.
Each cell says how it wants its slots laid out (`layout`, read by model/moe/token_dispatch.py):
  packed  groups follow each other without gaps;
  padded  each group has C slots, used or not.
"""

from collections.abc import Callable, Iterable

from mindspore import Parameter, Tensor, nn, ops

from mixtral_ms.kernels.cells.elementwise import swiglu
from mixtral_ms.kernels.native import custom_ops
from mixtral_ms.kernels.threaded import numpy_experts
from mixtral_ms.kernels.threaded.saved_activations import Kept
from mixtral_ms.parallel.comm.graph_primitives import zeros_like


class Experts(nn.Cell):
    """What the model asks of the experts, whoever computes them."""

    layout: str
    """"packed" or "padded"."""

    def keep_in(self, kept: Kept) -> None:
        """Have one store for what the backward reads, in common with other layers.

        For layers that are to be recomputed: only one at a time keeps something then, and backward
        computes it again. MindSpore itself recomputes no operator whose backward is given. Experts
        whose activations MindSpore keeps have nothing to do.
        """


class PaddedExperts(Experts):
    """Experts of equal capacity as one batched matrix product."""

    layout = "padded"

    def __init__(self) -> None:
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """R = E * C; slots past a group's size give what their input gives."""
        experts, _, hidden = w1_EFD.shape
        x_ECD = ops.reshape(x_RD, (experts, -1, hidden))
        act_ECF = swiglu(self.product(x_ECD, w1_EFD), self.product(x_ECD, w3_EFD))
        return ops.reshape(self.product(act_ECF, w2_EDF), (-1, hidden))


class PackedExperts(Experts):
    """Experts of any number of tokens on the CPU: only used slots are computed.

    Args:
        library: where the kernels are; the C++ ones take float32.
    """

    layout = "packed"

    def __init__(self, library: custom_ops.Library = custom_ops.NUMPY) -> None:
        super().__init__()
        self.network = _PackedNetwork(library)

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Slots past the groups give zero."""
        return self.network(x_RD, w1_EFD, w3_EFD, w2_EDF, tokens_per_expert_E)[0]


class ZeroCopyExperts(Experts):
    """As `PackedExperts` in numpy, on parameters that are read where they lie.

    MindSpore gives an operator in numpy a copy of each input and keeps it until the next run: twice
    all experts. C++ reads in place anyway.

    Args:
        weights: gives w1, w3 and w2, float32, for which other parameters may stand in meanwhile;
            `construct` is given these and nothing else.
    """

    layout = "packed"

    def __init__(self, weights: Callable[[], tuple[Parameter, ...]]) -> None:
        super().__init__()
        self.network = _InPlaceNetwork(weights)

    def keep_in(self, kept: Kept) -> None:
        """As `Experts.keep_in`."""
        self.network.kernel.kept = kept

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Slots past the groups give zero."""
        return self.network(x_RD, w1_EFD, w3_EFD, w2_EDF, tokens_per_expert_E)[0]


def share_kept(layers: Iterable[Experts]) -> None:
    """Give layers that are to be recomputed one store for what their backward reads."""
    kept = Kept()
    for one in layers:
        one.keep_in(kept)


class _PackedNetwork(nn.Cell):
    def __init__(self, library: custom_ops.Library) -> None:
        super().__init__()
        self.forward = custom_ops.expert_ffn_forward(library)
        self.backward = custom_ops.expert_ffn_backward(library)

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> tuple:
        return self.forward(x_RD, w1_EFD, w3_EFD, w2_EDF, tokens_per_expert_E)

    def bprop(  # noqa: PLR0913 - MindSpore's signature: inputs, outputs, their gradients
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
        out: tuple,
        dout: tuple,
    ) -> tuple:
        _, gate_RF, up_RF = out
        dx, dw1, dw3, dw2 = self.backward(
            x_RD, w1_EFD, w3_EFD, w2_EDF, tokens_per_expert_E, gate_RF, up_RF, dout[0]
        )
        return dx, dw1, dw3, dw2, zeros_like(tokens_per_expert_E)


class _InPlaceNetwork(nn.Cell):
    """As `_PackedNetwork` in numpy; weights are inputs only so that they have a gradient."""

    def __init__(self, weights: Callable[[], tuple[Parameter, ...]]) -> None:
        super().__init__()
        self.kernel = numpy_experts.InPlaceExperts(
            lambda: tuple(weight.asnumpy() for weight in weights()), lambda: self.training
        )
        self.forward, self.backward = custom_ops.expert_ffn_in_place(
            self.kernel, [list(weight.shape) for weight in weights()]
        )

    def construct(
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
    ) -> tuple:
        return self.forward(x_RD, tokens_per_expert_E)

    def bprop(  # noqa: PLR0913 - MindSpore's signature: inputs, outputs, their gradients
        self,
        x_RD: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        tokens_per_expert_E: Tensor,
        out: tuple,
        dout: tuple,
    ) -> tuple:
        dx, dw1, dw3, dw2 = self.backward(x_RD, tokens_per_expert_E, out[1], dout[0])
        return dx, dw1, dw3, dw2, zeros_like(tokens_per_expert_E)
