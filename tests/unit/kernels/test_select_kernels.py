"""Which kernels a run gets."""

import mindspore
import pytest
from helpers.kernels import cpp_kernels
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError
from mixtral_ms.kernels import select
from mixtral_ms.kernels.ascend.fused_adamw import FusedUpdate
from mixtral_ms.kernels.cells.attention import AttentionSizes
from mixtral_ms.kernels.cells.optimizer_update import PlainUpdate
from mixtral_ms.kernels.select import BACKENDS, select_kernels, select_update


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(select, "native_library", lambda: None)


@pytest.fixture
def on_ascend(monkeypatch):
    monkeypatch.setattr(mindspore, "get_context", {"device_target": "Ascend"}.get)


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match=r"'gpu'.*auto, plain, numpy, C\+\+, ascend"):
        select_kernels("gpu", dropless=True)


@pytest.mark.parametrize("dropless", [True, False])
def test_plain_kernels_take_experts_as_they_come(dropless):
    choice = select_kernels("plain", dropless=dropless)
    assert choice.experts().layout == ("packed" if dropless else "padded")


@pytest.mark.parametrize("dropless", [True, False])
def test_without_a_compiler_numpy_serves(dropless, without_compiler):
    choice = select_kernels(dropless=dropless)
    assert choice.name == "numpy"
    assert choice.experts().layout == "packed"


def test_cpp_asked_for_by_name_must_be_there(without_compiler):
    with pytest.raises(UserError, match=r"'C\+\+' cannot be used here"):
        select_kernels("C++", dropless=True)


def test_float16_does_not_reach_the_float32_kernels():
    assert select_kernels(dropless=True, dtype=mstype.float16).name == "plain"
    for backend in ("numpy", "C++"):
        with pytest.raises(UserError, match="computes in float32, not Float16: take plain"):
            select_kernels(backend, dropless=True, dtype=mstype.float16)


@pytest.mark.parametrize("dtype", [mstype.float32, mstype.bfloat16])
def test_ascend_has_its_own(dtype, on_ascend):
    assert select_kernels(dropless=True, dtype=dtype).name == "ascend"
    assert type(select_update()) is FusedUpdate
    assert type(select_update(fused=False)) is PlainUpdate


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_choice_has_the_name_it_was_asked_by_and_every_operator(backend):
    choice = cpp_kernels() if backend == "C++" else select_kernels(backend, dropless=True)
    assert choice.name == backend
    cells = (
        choice.experts(),
        choice.lora_experts(2.0, 0.0, 3, (True, False, True)),
        choice.attention(AttentionSizes(8, 4, 2, 6)),
        choice.rms_norm(1e-5),
        choice.cross_entropy(),
    )
    assert all(isinstance(cell, mindspore.nn.Cell) for cell in cells)


def test_experts_that_cannot_drop_say_so():
    choice = select_kernels("ascend", dropless=True)
    with pytest.raises(UserError, match=r"lora_dropout 0\.1.*on Ascend"):
        choice.lora_experts(2.0, 0.1, 0, (False, True, False))
    choice.lora_experts(2.0, 0.1, 0, (False, False, False))  # what drops is attention's
