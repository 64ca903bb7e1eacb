"""What a backend gives: a builder for each operator's cell.

Whoever needs an operator asks the choice for it, and never which backend it is.

Legend: E experts, V vocabulary, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mindspore
from mindspore import Parameter, Tensor, nn, ops

from mixtral_ms.kernels.cells.attention import (
    AttentionSizes,
    NativeRotaryAttention,
    PackedSamples,
    PlainRotaryAttention,
)
from mixtral_ms.kernels.cells.cache_sizes import CacheSizes, Keys
from mixtral_ms.kernels.cells.context_attention import ContextAttention
from mixtral_ms.kernels.cells.cross_entropy import LinearCrossEntropy, ZeroCopyCrossEntropy
from mixtral_ms.kernels.cells.experts import Experts, PackedExperts, PaddedExperts, ZeroCopyExperts
from mixtral_ms.kernels.cells.lora_experts import LowRankExperts
from mixtral_ms.kernels.cells.rms_norm import NativeRMSNorm, PlainRMSNorm
from mixtral_ms.kernels.native import custom_ops
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup


@dataclass(frozen=True)
class FusedOperators:
    """Which of a device's fused operators are used, where there are some.

    Attributes:
        rotary: the rotary embedding as one.
        swiglu: the experts' SwiGLU as one.
        norm_dtype: that norms are computed in; None for their input's.
    """

    rotary: bool = True
    swiglu: bool = True
    norm_dtype: mindspore.Type | None = None


class UpdateKernels(Protocol):
    """What an optimizer's step is computed with; the norm of gradients too."""

    def squares(self, x: Tensor) -> Tensor:
        """The sum of a tensor's squares in float32, on the device."""

    def sum_of_squares(self, x: Tensor) -> float:
        """The sum of a tensor's squares."""


class PagedCache(Protocol):
    """A layer's KV cache as a backend wants it, and attention over it."""

    sizes: CacheSizes
    reads: str
    """How keys are read when sequences get a token each, for the log."""
    table: bool
    """Whether that is by the sequences' block tables (keys "table"); else by slots ("cached")."""

    def shape(self, blocks: int) -> tuple[int, ...]:
        """Of the parameter that holds all keys, or all values."""
        ...

    def own_limit(self) -> Tensor:
        """What attention is given as `limit` where tokens see each other only: for all layers."""
        ...

    def attention(self, where: Keys, keys: Parameter, values: Parameter) -> nn.Cell:
        """Writes the tokens' keys and values to the cache and attends.

        The cell takes rotated q_THd, k_TKd, v_TKd in the cache's dtype; slots_T (int32) to write
        to; `seen` and `limit`, which say what of the cache each sequence sees: for "table" block
        tables (N, M) and lengths (N,) in int32, for "cached" slots (N, S) in int32 and a mask
        (N, 1, t, S), True to hide, for "own" None and `own_limit`. It returns (T, H * d).
        """
        ...


class KernelChoice:
    """Plain operators, on any device. Other backends are subclasses, and plain where they lack one.

    Args:
        dropless: whether experts have any number of tokens (True) or a fixed capacity.
    """

    name = "plain"
    """For the log."""

    def __init__(self, dropless: bool) -> None:
        self.dropless = dropless

    def experts(self, weights: Callable[[], tuple[Parameter, ...]] | None = None) -> Experts:
        """The experts' SwiGLU networks.

        Args:
            weights: gives w1, w3 and w2, the float32 parameters that the cell will always be given
                (others may stand in for them meanwhile): a kernel may read them where they lie.
                None where weights are computed.
        """
        return PackedExperts() if self.dropless else PaddedExperts()

    def lora_experts(
        self, scale: float, dropout: float, salt: int, adapted: tuple[bool, bool, bool]
    ) -> Experts:
        """Experts whose weights are frozen, with low-rank adapters.

        Args:
            scale: of the adapters.
            dropout: part of an adapter's inputs that is dropped in training.
            salt: a number of the layer's own, so that layers drop different values.
            adapted: which of w1, w3 and w2 have an adapter.

        Raises:
            UserError: the backend cannot do that.
        """
        return LowRankExperts(scale, dropout if any(adapted) else 0.0, salt)

    def attention(self, sizes: AttentionSizes) -> nn.Cell:
        """Causal attention with rotary embedding."""
        return PlainRotaryAttention(sizes)

    def context_attention(self, group: ProcessGroup, sizes: AttentionSizes) -> nn.Cell:
        """The same where a group of ranks splits the sequence; `sizes` are of this rank's part."""
        return ContextAttention(group, sizes)

    def packed_samples(
        self, batch_size: int, sizes: AttentionSizes, group: ProcessGroup
    ) -> PackedSamples | None:
        """What attention is given of packed samples, once for all layers.

        None where it takes the segment ids themselves.
        """
        return None

    def paged_cache(self, sizes: CacheSizes) -> "PagedCache | None":
        """Attention over a paged KV cache, for prediction on a device.

        None where the backend has none: prediction then computes in float32 and in the CPU's own
        form, in which a token's numbers do not depend on what else is in the batch.
        """
        return None

    def rms_norm(self, eps: float) -> nn.Cell:
        """Root mean square norm."""
        return PlainRMSNorm(eps)

    def top_k(self) -> nn.Cell | ops.Primitive:
        """Rows, k -> the k largest of each, best first, and their indices (int32)."""
        return ops.TopK(sorted=True)

    def cross_entropy(
        self, vocabulary: ProcessGroup = ALONE, weight: Callable[[], Parameter] | None = None
    ) -> nn.Cell:
        """The loss from hidden states and the head's weight.

        Args:
            vocabulary: ranks that have a part each of the weight's rows.
            weight: gives the float32 (V, D) parameter that the cell will always be given (another
                one may stand in for it meanwhile), and whose gradient is wanted: a kernel may read
                it where it lies.
        """
        return LinearCrossEntropy(vocabulary=vocabulary)


class LibraryKernels(KernelChoice):
    """Operators of our own for the CPU, float32.

    Args:
        library: where they are.
        dropless: as in `KernelChoice`; they leave unused slots out either way.
    """

    name = "C++"

    def __init__(self, library: custom_ops.Library, dropless: bool) -> None:
        super().__init__(dropless)
        self.library = library

    def experts(self, weights: Callable[[], tuple[Parameter, ...]] | None = None) -> Experts:
        """They read every weight where it lies."""
        return PackedExperts(self.library)

    def attention(self, sizes: AttentionSizes) -> nn.Cell:
        """As `KernelChoice.attention`."""
        return NativeRotaryAttention(self.library, sizes)

    def rms_norm(self, eps: float) -> nn.Cell:
        """As `KernelChoice.rms_norm`."""
        return NativeRMSNorm(self.library, eps)

    def cross_entropy(
        self, vocabulary: ProcessGroup = ALONE, weight: Callable[[], Parameter] | None = None
    ) -> nn.Cell:
        """As `KernelChoice.cross_entropy`."""
        return LinearCrossEntropy(self.library, vocabulary)


class NumpyKernels(LibraryKernels):
    """The same in numpy, where C++ cannot be built.

    MindSpore gives an operator in numpy a copy of each input, and keeps it until the next run: so
    weights that stay are read where they lie.
    """

    name = "numpy"

    def __init__(self, dropless: bool) -> None:
        super().__init__(custom_ops.NUMPY, dropless)

    def experts(self, weights: Callable[[], tuple[Parameter, ...]] | None = None) -> Experts:
        """As `KernelChoice.experts`."""
        return super().experts() if weights is None else ZeroCopyExperts(weights)

    def cross_entropy(
        self, vocabulary: ProcessGroup = ALONE, weight: Callable[[], Parameter] | None = None
    ) -> nn.Cell:
        """As `KernelChoice.cross_entropy`."""
        if weight is None or vocabulary.size > 1:
            return super().cross_entropy(vocabulary)
        return ZeroCopyCrossEntropy(weight)
