"""What is pretended is pretended for a time, and of one process."""

import resource
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, Tensor
from mindspore.ops.operations import comm_ops

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.graphs.pretended_device import PretendedAscend, replaced, without_values
from mixtral_ms.parallel.grid.mesh import Mesh


def resident_bytes():
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * resource.getpagesize()


def test_ascend_and_its_groups():
    device = PretendedAscend(3)
    mesh = Mesh(ParallelConfig(data_parallel=2, model_parallel=2), 3, device.connect)
    before = mindspore.get_context, comm_ops.get_rank
    with device.in_place():
        assert mindspore.get_context("device_target") == "Ascend"
        assert mindspore.get_context("mode") in (0, 1)
        reduce = mindspore.ops.AllReduce(group=mesh.tensor.name)
        assert reduce.group == mesh.tensor.name
        assert comm_ops.get_rank(mesh.tensor.name) == 1
        assert comm_ops.get_group_size(mesh.world.name) == 4
    assert (mindspore.get_context, comm_ops.get_rank) == before
    assert mindspore.get_context("device_target") == "CPU"


def test_parameters_without_values(device):
    before = resident_bytes()
    with without_values():
        big = np.zeros((1 << 13, 1 << 16), np.float32)  # 2 GiB that nobody touches
        parameter = Parameter(Tensor.from_numpy(big), name="big")
        hidden = mindspore.ops.zeros((2, 3), mindspore.bfloat16)
    assert resident_bytes() - before < 1 << 28
    assert (parameter.shape, parameter.dtype) == (big.shape, mindspore.float32)
    assert (hidden.shape, hidden.dtype) == ((2, 3), mindspore.bfloat16)
    assert np.array_equal(Tensor.from_numpy(np.ones(2, np.float32)).asnumpy(), [1, 1])
    assert not Parameter(Tensor([1.0]), name="small").has_init


def test_replaced_puts_back_what_was_there():
    class Owner:
        kept = 1

    class Heir(Owner):
        pass

    with pytest.raises(ZeroDivisionError), replaced(Owner, "kept", 2), replaced(Heir, "kept", 3):
        assert (Owner.kept, Heir.kept) == (2, 3)
        raise ZeroDivisionError
    assert Owner.kept == 1
    assert "kept" not in vars(Heir)
