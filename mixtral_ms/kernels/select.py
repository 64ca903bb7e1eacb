"""The choice of which implementation of each operator a run uses; nothing else makes it."""

import functools

import mindspore
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError
from mixtral_ms.kernels.cells.optimizer_update import NativeUpdate, NumpyUpdate, PlainUpdate
from mixtral_ms.kernels.kernel_choice import (
    FusedOperators,
    KernelChoice,
    LibraryKernels,
    NumpyKernels,
)
from mixtral_ms.kernels.native.build import native_library
from mixtral_ms.log import get_logger

BACKENDS = ("auto", "plain", "numpy", "C++", "ascend")


def select_kernels(
    backend: str = "auto",
    *,
    dropless: bool,
    dtype: mstype.Type = mstype.float32,
    fused: FusedOperators | None = None,
) -> KernelChoice:
    """Kernels of a backend.

    Args:
        backend: "auto" chooses by the device: Ascend's, or on a CPU C++ where it builds and numpy
            elsewhere, plain ones for other dtypes than float32. Or the name of that one and no
            other; "plain" are MindSpore's own operators.
        dropless: whether experts have any number of tokens (True) or a fixed capacity.
        dtype: compute dtype.
        fused: which fused operators are used, of a backend that has some; None for all.

    Raises:
        UserError: an unknown backend, or one that cannot be had.
    """
    if backend not in BACKENDS:
        raise UserError(f"kernel backend {backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _backend_of_device(dtype)
    if backend == "ascend":
        # only that backend needs them
        from mixtral_ms.kernels.ascend.ascend_kernels import AscendKernels  # noqa: PLC0415

        return AscendKernels(dropless, fused or FusedOperators())
    if fused is not None and fused.norm_dtype not in (None, mstype.float32):
        _say_norms_are_float32()
    if backend == "plain":
        return KernelChoice(dropless)
    if dtype != mstype.float32:
        raise UserError(f"kernel backend {backend!r} computes in float32, not {dtype}: take plain")
    if backend == "numpy":
        return NumpyKernels(dropless)
    library = native_library()
    if library is None:
        raise UserError("kernel backend 'C++' cannot be used here; the log says why: take numpy")
    return LibraryKernels(library, dropless)


@functools.cache
def _say_norms_are_float32() -> None:
    get_logger().info("norms are computed in float32: layernorm_compute_type acts on Ascend only")


def _backend_of_device(dtype: mstype.Type) -> str:
    if not _on_cpu():
        return "ascend"
    if dtype != mstype.float32:
        return "plain"
    return "C++" if native_library() else "numpy"


def select_update(*, fused: bool = True) -> PlainUpdate:
    """How the optimizer updates a tensor on this device.

    Args:
        fused: by Ascend's operator for it, where that is the device.
    """
    if not _on_cpu():
        from mixtral_ms.kernels.ascend.fused_adamw import FusedUpdate  # noqa: PLC0415 - as above

        return FusedUpdate() if fused else PlainUpdate()
    library = native_library()
    return NativeUpdate(library) if library else NumpyUpdate()


def _on_cpu() -> bool:
    return mindspore.get_context("device_target") == "CPU"
