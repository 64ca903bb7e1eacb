"""The operators that Ascend has of its own, as one choice."""

from collections.abc import Callable

from mindspore import Parameter, nn

from mixtral_ms.errors import UserError
from mixtral_ms.kernels.ascend.cached_attention import AscendCache
from mixtral_ms.kernels.ascend.documented_top_k import DocumentedTopK
from mixtral_ms.kernels.ascend.flash_attention import FlashRotaryAttention
from mixtral_ms.kernels.ascend.fused_rms_norm import FusedRMSNorm
from mixtral_ms.kernels.ascend.grouped_experts import BatchedExperts, GroupedExperts
from mixtral_ms.kernels.ascend.packed_samples import SampleEnds
from mixtral_ms.kernels.ascend.window_blocks import HiddenInBlocks
from mixtral_ms.kernels.cells.attention import AttentionSizes, PackedSamples
from mixtral_ms.kernels.cells.cache_sizes import CacheSizes
from mixtral_ms.kernels.cells.experts import Experts, PaddedExperts
from mixtral_ms.kernels.cells.lora_experts import MergedExperts
from mixtral_ms.kernels.kernel_choice import FusedOperators, KernelChoice, PagedCache
from mixtral_ms.parallel.grid.mesh import ProcessGroup


class AscendKernels(KernelChoice):
    """Fused operators; the loss is plain, and so are experts of a fixed capacity.

    Those are batched products: no count leaves the device, and nothing has a dynamic shape.
    """

    name = "ascend"

    def __init__(self, dropless: bool, fused: FusedOperators) -> None:
        super().__init__(dropless)
        self.fused = fused

    def experts(self, weights: Callable[[], tuple[Parameter, ...]] | None = None) -> Experts:
        """As `KernelChoice.experts`."""
        if self.dropless:
            return GroupedExperts(fused=self.fused.swiglu)
        return BatchedExperts() if self.fused.swiglu else PaddedExperts()

    def lora_experts(
        self, scale: float, dropout: float, salt: int, adapted: tuple[bool, bool, bool]
    ) -> Experts:
        """As `KernelChoice.lora_experts`; they drop nothing."""
        if any(adapted) and dropout > 0:
            raise UserError(
                f"model_config.pet_config.lora_dropout {dropout}: adapters of experts drop nothing "
                "on Ascend: set it to 0, or adapt attention alone"
            )
        return MergedExperts(self.experts(), scale, adapted)

    def attention(self, sizes: AttentionSizes) -> nn.Cell:
        """As `KernelChoice.attention`."""
        return FlashRotaryAttention(sizes, fused_rotary=self.fused.rotary)

    def context_attention(self, group: ProcessGroup, sizes: AttentionSizes) -> nn.Cell:
        """As `KernelChoice.context_attention`."""
        return FlashRotaryAttention(sizes, group, fused_rotary=self.fused.rotary)

    def packed_samples(
        self, batch_size: int, sizes: AttentionSizes, group: ProcessGroup
    ) -> PackedSamples:
        """As `KernelChoice.packed_samples`."""
        if sizes.window is None:
            return SampleEnds(batch_size, sizes, group)
        return HiddenInBlocks(sizes.seq_length, sizes.window, group)

    def paged_cache(self, sizes: CacheSizes) -> PagedCache | None:
        """As `KernelChoice.paged_cache`."""
        return AscendCache(sizes)

    def top_k(self) -> nn.Cell:
        """As `KernelChoice.top_k`."""
        return DocumentedTopK()

    def rms_norm(self, eps: float) -> nn.Cell:
        """As `KernelChoice.rms_norm`."""
        return FusedRMSNorm(eps, self.fused.norm_dtype)
