"""Ascend's fused operators, emulated, against single steps; and that keys choose between them."""

from pathlib import Path

import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.kernels import gradients_of, random
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.graphs.typed_graph import read_typed_graph
from mixtral_ms.kernels.kernel_choice import FusedOperators
from mixtral_ms.kernels.select import select_kernels

TOLERANCE = 1e-5
SINGLE_STEPS = FusedOperators(rotary=False, swiglu=False)


@pytest.mark.usefixtures("pynative", "ascend_emulation")
@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("rows", [6, 24], ids=["join columns", "join weights"])
def test_experts(rows, dropless):
    """More rows than experts times columns: then weights are joined."""
    experts, hidden, intermediate = 2, 10, 14
    inputs = [random(1, rows, hidden)]
    inputs += [random(seed, experts, intermediate, hidden) for seed in (2, 3)]
    inputs += [random(4, experts, hidden, intermediate), np.full(experts, rows // 2, np.int32)]
    towards = random(5, rows, hidden)
    fused = select_kernels("ascend", dropless=dropless).experts()
    plain = select_kernels("ascend", dropless=dropless, fused=SINGLE_STEPS).experts()
    out, gradients = gradients_of(fused, inputs, towards)
    expected, theirs = gradients_of(plain, inputs, towards)
    assert_close(out, expected, TOLERANCE, "out")
    for what, ours, other in zip(("x", "w1", "w3", "w2"), gradients, theirs, strict=True):
        assert_close(ours, other, TOLERANCE, what)


@pytest.mark.usefixtures("pynative", "ascend_emulation")
@pytest.mark.parametrize("dtype", [None, mstype.float32, mstype.float16])
def test_norms_are_computed_in_the_dtype_of_the_key(dtype):
    x, weight = random(1, 6, 8), 1 + random(2, 8) / 300
    given = np.float16 if dtype == mstype.float32 else np.float32
    fused = FusedOperators(norm_dtype=dtype)
    norm = select_kernels("ascend", dropless=True, fused=fused).rms_norm(1e-3)
    out = norm(Tensor(x.astype(given)), Tensor(weight))
    assert out.dtype == Tensor(x.astype(given)).dtype
    rounded = {None: given, mstype.float32: np.float32, mstype.float16: np.float16}[dtype]
    wide = x.astype(given).astype(rounded).astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-3)
    expected = (expected * weight.astype(rounded)).astype(rounded).astype(given)
    assert_close(out.asnumpy(), expected, TOLERANCE, "norm")


@pytest.mark.usefixtures("pynative", "ascend_emulation")
def test_the_best_of_equal_scores_is_the_first():
    scores = np.array([[3, 1, 3, 2], [0, 0, 0, 0], [1, 5, 4, 5]], np.float32)
    top_k = select_kernels("ascend", dropless=True).top_k()
    values, indices = top_k(Tensor(scores), 2)
    assert indices.asnumpy().tolist() == [[0, 2], [0, 1], [1, 3]]
    assert indices.dtype == mstype.int32
    assert values.asnumpy().tolist() == [[3, 3], [0, 0], [5, 5]]
    towards = random(1, 3, 2)
    _, (gradient,) = gradients_of(lambda x: top_k(x, 2)[0], [scores], towards)
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, indices.asnumpy(), towards, 1)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.long
@pytest.mark.parametrize("case", ["ep 2, capacity, select_recompute"])
def test_select_recompute_computes_attention_and_norms_again(case, compiled):
    graph = read_typed_graph(Path(compiled(case).graphs[0].file))
    again = [node for node in graph.nodes if "duplicated: Bool(1)" in node.attributes]
    primitives = {node.primitive for node in again}
    assert {"RmsNorm", "FlashAttentionScore", "RotaryPositionEmbedding", "MatMul"} <= primitives
    of_experts = {"BatchMatMul", "AlltoAll", "Swiglu", "TopK", "Gather", "ScatterNd"}
    assert primitives & of_experts == set()


@pytest.mark.long
@pytest.mark.parametrize("case", ["float16, norms too", "operators of single steps"])
def test_keys_choose_operators(case, compiled):
    graph = read_typed_graph(Path(compiled(case).graphs[0].file))
    found = {node.primitive for node in graph.nodes}
    single = case == "operators of single steps"
    for operator in ("RotaryPositionEmbedding", "Swiglu"):
        assert (operator in found) == (not single), operator
