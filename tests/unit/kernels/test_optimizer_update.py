"""What the optimizer does to one tensor, each implementation against plain formulas in float64."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mixtral_ms.kernels.cells.optimizer_update import NativeUpdate, NumpyUpdate, PlainUpdate
from mixtral_ms.kernels.native.build import native_library

pytestmark = pytest.mark.usefixtures("pynative")

TOLERANCE = 1e-5


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def update_of(name, device):
    if name == "C++":
        library = native_library()
        if library is None or device != "CPU":
            pytest.skip("the C++ kernels do not build here")
        return NativeUpdate(library)
    if name == "numpy" and device != "CPU":
        pytest.skip("that shares the CPU's memory")
    return {"plain": PlainUpdate, "numpy": NumpyUpdate}[name]()


@pytest.mark.parametrize("name", ["C++", "numpy", "plain"])
@pytest.mark.parametrize("decay, scale", [(0.0, 1.0), (0.3, 0.5)], ids=str)
def test_adamw(name, decay, scale, device, record_error):
    """One step without a bias correction; the gradient stays as it was."""
    rate, beta1, beta2, eps = 0.01, 0.9, 0.95, 1e-3
    values = [random(1, 70, 9), random(2, 70, 9), random(3, 70, 9) ** 2, random(4, 70, 9)]
    tensors = [Parameter(Tensor(v), name=n) for v, n in zip(values[:3], "pmv", strict=True)]
    gradient = Tensor(values[3])
    update = update_of(name, device)
    update.adamw(tensors[0], tuple(tensors[1:]), gradient, (rate, beta1, beta2, eps, decay, scale))
    p, m, v, g = (value.astype(np.float64) for value in values)
    m = beta1 * m + (1 - beta1) * g * scale
    v = beta2 * v + (1 - beta2) * (g * scale) ** 2
    p = p - rate * (m / (np.sqrt(v) + eps) + decay * p)
    for what, got, expected in zip("pmv", tensors, (p, m, v), strict=True):
        record_error(what, got.asnumpy(), expected, TOLERANCE)
    np.testing.assert_array_equal(gradient.asnumpy(), values[3])


@pytest.mark.parametrize("name", ["numpy", "plain"])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (3, 100, 123)], ids=str)
def test_sum_of_squares(name, shape, device, record_error):
    x = random(1, *shape)
    update = update_of(name, device)
    expected = np.square(x.astype(np.float64)).sum()
    record_error("sum", update.sum_of_squares(Tensor(x)), expected, TOLERANCE)
    x.flat[-1] = np.nan
    assert not np.isfinite(update.sum_of_squares(Tensor(x)))
