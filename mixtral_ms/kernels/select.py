"""The choice of which implementation of each operator a run uses; nothing else makes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mindspore import dtype as mstype
from mindspore import nn

from mixtral_ms.errors import UserError
from mixtral_ms.kernels.cells.attention import (
    AttentionSizes,
    NativeRotaryAttention,
    PlainRotaryAttention,
)
from mixtral_ms.kernels.cells.cross_entropy import LinearCrossEntropy
from mixtral_ms.kernels.cells.experts import PackedExperts, PaddedExperts
from mixtral_ms.kernels.cells.optimizer_update import CpuUpdate, NativeUpdate, PlainUpdate
from mixtral_ms.kernels.cells.rms_norm import NativeRMSNorm, PlainRMSNorm
from mixtral_ms.kernels.native.build import native_library
from mixtral_ms.kernels.native.custom_ops import NUMPY

BACKENDS = ("cpu", "reference", "ascend")


@dataclass(frozen=True)
class KernelChoice:
    """Builders of the operators' cells."""

    name: str
    experts: Callable[[], nn.Cell]
    attention: Callable[[AttentionSizes], nn.Cell]
    rms_norm: Callable[[float], nn.Cell]
    cross_entropy: Callable[..., nn.Cell]


def select_kernels(
    backend: str, *, dropless: bool, dtype: mstype.Type = mstype.float32
) -> KernelChoice:
    """Kernels of a backend.

    Args:
        backend: "cpu" (C++ where it builds, numpy elsewhere), "reference" (plain
            operators everywhere) or "ascend".
        dropless: whether experts take any number of tokens (True) or a fixed capacity.
        dtype: compute dtype; others than float32 have plain operators.

    Raises:
        UserError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise UserError(f"kernel backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "ascend":
        # only that backend needs them
        from mixtral_ms.kernels.ascend.flash_attention import FlashRotaryAttention  # noqa: PLC0415
        from mixtral_ms.kernels.ascend.fused_rms_norm import FusedRMSNorm  # noqa: PLC0415
        from mixtral_ms.kernels.ascend.grouped_experts import GroupedExperts  # noqa: PLC0415

        return KernelChoice(
            "ascend",
            GroupedExperts,
            FlashRotaryAttention,
            FusedRMSNorm,
            LinearCrossEntropy,
        )
    if backend == "reference" or dtype != mstype.float32:
        experts = PackedExperts if dropless else PaddedExperts
        return KernelChoice(
            "plain", experts, PlainRotaryAttention, PlainRMSNorm, LinearCrossEntropy
        )
    library = native_library() or NUMPY
    return KernelChoice(
        "numpy" if library == NUMPY else "C++",
        partial(PackedExperts, library),
        partial(NativeRotaryAttention, library),
        partial(NativeRMSNorm, library),
        partial(LinearCrossEntropy, library),
    )


def select_update(device_target: str) -> PlainUpdate:
    """How the optimizer updates a tensor on a device."""
    if device_target != "CPU":
        return PlainUpdate()
    library = native_library()
    return NativeUpdate(library) if library else CpuUpdate()
