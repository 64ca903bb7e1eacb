"""Kernels by name, and their gradients, for the tests of kernels."""

import mindspore
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mixtral_ms.kernels.native.build import native_library
from mixtral_ms.kernels.select import select_kernels


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def gradients_of(cell, inputs, towards):
    """Output of the cell, and the gradients of sum(output * towards) by `inputs`' tensors."""

    def objective(*tensors):
        out = cell(*tensors)
        return (out * Tensor(towards)).sum(), out

    tensors = [Tensor(value) for value in inputs]
    # a single gradient comes without its tuple
    positions = tuple(i for i, value in enumerate(inputs) if value.dtype == np.float32)
    (_, out), grads = mindspore.value_and_grad(objective, positions, None, has_aux=True)(*tensors)
    grads = grads if len(positions) > 1 else (grads,)
    return out.asnumpy(), [gradient.asnumpy() for gradient in grads]


def cpp_kernels():
    if native_library() is None:
        pytest.skip("the C++ kernels do not build here")
    return select_kernels("C++", dropless=True)


def numpy_kernels(device):
    if device == "Ascend":
        pytest.skip("numpy's are the CPU's")
    return select_kernels("numpy", dropless=True)


def kernels_of(name, device):
    """The choice named plain or numpy, or that of the device."""
    if name == "plain":
        return select_kernels("plain", dropless=True)
    if name == "numpy":
        return numpy_kernels(device)
    return select_kernels("ascend", dropless=True) if device == "Ascend" else cpp_kernels()
