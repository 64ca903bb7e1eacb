"""Operators that MindFormers asks for and MindSpore has not on CPU. Other devices: untouched."""

import functools

import mindspore
from mindformers import MFTrainOneStepCell
from mindformers.generation import logits_process
from mindformers.models import PreTrainedModel
from mindspore import Tensor, ops


def on_cpu() -> bool:
    """Whether MindSpore computes on the CPU."""
    return mindspore.get_context("device_target") == "CPU"


def work_around_missing_operators(network: PreTrainedModel) -> None:
    """On CPU, replace what would fail when this network is trained or generates."""
    if not on_cpu():
        return
    # mint.argmax: "Kernel ArgMaxExt unregistered"
    network.argmax = _argmax
    _replace_overflow_check()
    # mint.topk and others: "The kernel TopkExt unregistered". MindFormers has the same in numpy.
    logits_process.run_using_numpy = lambda: True


def _argmax(logits: Tensor, axis: int) -> Tensor:
    return ops.argmax(logits, axis)


@functools.cache
def _replace_overflow_check() -> None:
    # Its own asks the device's status register: "NPUGetFloatStatusV2 unregistered".
    MFTrainOneStepCell.get_overflow_status = _not_finite


def _not_finite(self: MFTrainOneStepCell, status: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
    """Whether a gradient is NaN or infinite, on this rank or another."""
    finite = self.hyper_map(_all_finite, gradients)
    bad = ops.cast(ops.logical_not(ops.all(ops.stack(finite))), mindspore.float32)
    if self.is_distributed:
        bad = self.allreduce(bad)
    return bad > 0


def _all_finite(gradient: Tensor) -> Tensor:
    return ops.all(ops.isfinite(gradient))
