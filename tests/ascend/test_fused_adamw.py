"""AdamW by Ascend's operator gives the plain update's numbers, and reads nothing on the host."""

import numpy as np
import pytest
from helpers.ascend_emulation import AdamW as EmulatedAdamW
from mindspore import Parameter, Tensor

from mixtral_ms.graphs.step_reads import counted_reads
from mixtral_ms.kernels.ascend import fused_adamw
from mixtral_ms.kernels.ascend.fused_adamw import FusedUpdate
from mixtral_ms.kernels.cells.optimizer_update import PlainUpdate
from mixtral_ms.train.step.adamw import AdamW

SHAPES = {"matrix.weight": (5, 7), "norm.weight": (6,)}


@pytest.fixture(params=[0, 1], ids=["steps from 0", "steps from 1"])
def emulated(request, monkeypatch, pynative):
    """The documentation leaves it open which one it is."""
    monkeypatch.setattr(fused_adamw, "AdamW", lambda: EmulatedAdamW(request.param))


def trained(kernels, betas, decay):
    draw = np.random.default_rng(1).standard_normal
    parameters = [Parameter(Tensor(draw(s).astype(np.float32)), name=n) for n, s in SHAPES.items()]
    optimizer = AdamW(parameters, betas=betas, eps=1e-6, weight_decay=decay)
    optimizer.kernels = kernels
    for step in range(6):
        gradients = [
            Tensor((10.0 ** (step % 3 - 1) * draw(s)).astype(np.float32)) for s in SHAPES.values()
        ]
        optimizer.update(tuple(gradients), 0.01 * (step + 1), (1.0, 0.25)[step % 2])
    return {p.name: p.asnumpy() for p in parameters} | optimizer.state_tensors()


@pytest.mark.parametrize("betas, decay", [((0.9, 0.95), 0.1), ((0.9, 0.999), 0.0)])
def test_it_gives_the_plain_numbers(betas, decay, emulated, record_error):
    expected = trained(PlainUpdate(), betas, decay)
    for name, value in trained(FusedUpdate(), betas, decay).items():
        record_error(name, value, expected[name], 1e-6)


@pytest.mark.usefixtures("pynative")
def test_the_host_reads_nothing(monkeypatch):
    monkeypatch.setattr(fused_adamw, "AdamW", lambda: lambda *_: None)
    with counted_reads() as count:
        parameter, *moments = (Parameter(Tensor(np.ones(4, np.float32))) for _ in range(3))
        made = count()
        FusedUpdate().adamw(parameter, moments, Tensor(np.ones(4, np.float32)), [0.1] * 6)
        assert count() == made
