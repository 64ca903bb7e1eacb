"""The experts' exchange in parts: the same numbers, and no part waits for another's products.

Legend: T tokens, D hidden.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.kernels import gradients_of, random
from helpers.tiny import tiny_config
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.model.moe.routed_experts import RoutedExperts
from mixtral_ms.parallel.grid.mesh import Mesh

TOLERANCE = 1e-5


def routed(degree):
    """On one of two ranks of which nobody is there: what it sends comes back to it."""
    moe = {"capacity_factor": 1.3, "expert_num": 4, "num_experts_chosen": 2}
    moe |= {"comp_comm_parallel": degree > 1, "comp_comm_parallel_degree": max(degree, 2)}
    config = tiny_config(moe_config=moe)
    mesh = Mesh(ParallelConfig(data_parallel=2, expert_parallel=2), 0)
    kernels = select_kernels("plain", dropless=False)
    cell = RoutedExperts(config, 0, (2, 10), kernels, mstype.float32, mesh)
    for number, parameter in enumerate(cell.get_parameters()):
        parameter.set_data(Tensor(random(number, *parameter.shape)))
    return cell, config.hidden_size


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("degree", [2, 3, 999])
def test_numbers_are_the_same(degree):
    (whole, hidden), (parts, _) = routed(1), routed(degree)
    assert parts.in_parts
    assert not whole.in_parts
    x_TD, towards = random(8, 20, hidden), random(9, 20, hidden)
    valid_T = Tensor(np.ones(20, bool))
    (out, (d_x, d_routed)), (expected, theirs) = (
        gradients_of(lambda x, y, c=cell: c(x, y, valid_T)[0], [x_TD, x_TD], towards)
        for cell in (parts, whole)
    )
    assert_close(out, expected, TOLERANCE, "out")
    assert_close(d_x, theirs[0], TOLERANCE, "d_x")
    assert_close(d_routed, theirs[1], TOLERANCE, "d_routed")


def ancestors(file):
    """Of each node of the IR file, by name: the primitives of those it depends on, itself first."""
    found = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if node := re.match(r"\s*(%\d+)\(.*?\) = (?:PrimFunc_)?(\w+)\((.*?)\)(?: |$)", line):
            name, primitive, arguments = node.groups()
            before = {name: primitive}
            for one in re.findall(r"%\d+", arguments):
                before |= found.get(one, {})
            found[name] = before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ep 2, capacity, in parts"])
def test_no_exchange_waits_for_products_of_another_part(case, compiled):
    found = ancestors(compiled(case).graphs[0].file)
    counts = [
        [list(before.values()).count(one) for one in ("AlltoAll", "BatchMatMul")]
        for name, before in found.items()
        if before[name] == "AlltoAll"
    ]
    # two parts go out, of nothing; each comes back by its own products, of which there are three
    products = min(count[1] for count in counts if count[1])
    assert counts.count([1, 0]) == 2
    assert counts.count([2, products]) == 2
    assert products <= 3
