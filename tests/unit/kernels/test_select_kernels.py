"""Which kernels a run gets."""

import pytest
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError
from mixtral_ms.kernels import select
from mixtral_ms.kernels.select import select_kernels


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="'gpu'.*cpu, reference, ascend"):
        select_kernels("gpu", dropless=True)


@pytest.mark.parametrize("dropless", [True, False])
def test_the_reference_backend_is_plain(dropless):
    choice = select_kernels("reference", dropless=dropless)
    assert choice.name == "plain"
    assert choice.experts().layout == ("packed" if dropless else "padded")


@pytest.mark.parametrize("dropless", [True, False])
def test_without_a_compiler_numpy_serves(dropless, monkeypatch):
    monkeypatch.setattr(select, "native_library", lambda: None)
    choice = select_kernels("cpu", dropless=dropless)
    assert choice.name == "numpy"
    assert choice.experts().layout == "packed"


def test_float16_does_not_reach_the_float32_kernels():
    assert select_kernels("cpu", dropless=True, dtype=mstype.float16).name == "plain"
