"""What the grouped product leaves unwritten reaches no result.

CANN's documentation of aclnnGroupedMatmul: rows behind the last group keep what the memory held.
Here they hold NaN.

Legend: T tokens, k experts a token, E experts, e those of this rank, R rows, D hidden,
F intermediate.
"""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor

from mixtral_ms.kernels.ascend import grouped_experts
from mixtral_ms.model.moe.token_dispatch import CombineTokens, Dispatch, PermuteTokens

pytestmark = pytest.mark.usefixtures("pynative", "ascend_emulation")
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 16, 32
CHOSEN_TK = np.array([[0, 1], [1, 2], [3, 0], [2, 6]], np.int32)


class PoisonedProduct:
    """GroupedMatmul as documented, with NaN where it says nothing of the result."""

    def __init__(self, split_item, group_type):
        assert (split_item, group_type) == (3, 0)

    def __call__(self, x, weight, *empty):
        (x_RD,), (weight_eDF,), group_ends_e = x, weight, empty[-1].asnumpy()
        assert empty[-1].dtype == mindspore.int64
        assert (np.diff(group_ends_e, prepend=0) >= 0).all()
        assert group_ends_e[-1] <= x_RD.shape[0]
        y = np.full((x_RD.shape[0], weight_eDF.shape[2]), np.nan, np.float32)
        begin = 0
        for expert, end in enumerate(group_ends_e):
            y[begin:end] = x_RD.asnumpy()[begin:end] @ weight_eDF.asnumpy()[expert]
            begin = end
        return (Tensor(y),)


@pytest.mark.parametrize("local_experts", [(0, 1, 2, 3), (1, 7), (7,)])
@pytest.mark.parametrize("valid", [True, False])
def test_output_and_gradients_are_numbers(monkeypatch, local_experts, valid):
    monkeypatch.setattr(grouped_experts, "GroupedMatmul", PoisonedProduct)
    random = np.random.default_rng(0)
    x_TD, dy_TD = random.standard_normal((2, len(CHOSEN_TK), HIDDEN)).astype(np.float32)
    e, shape = len(local_experts), CHOSEN_TK.shape
    w1, w3 = random.standard_normal((2, e, INTERMEDIATE, HIDDEN)).astype(np.float32)
    w2 = random.standard_normal((e, HIDDEN, INTERMEDIATE)).astype(np.float32)

    dispatch = Dispatch(EXPERTS, None, False, "packed", local_experts)
    slot_Tk, not_dropped_Tk, assignment_R, tokens_per_local_expert_e, *_ = dispatch(
        Tensor(CHOSEN_TK), Tensor(np.full(shape, valid))
    )
    x_RD = PermuteTokens(TOP_K)(Tensor(x_TD), assignment_R, slot_Tk, not_dropped_Tk)
    y_RD = grouped_experts.GroupedExperts()(
        x_RD, Tensor(w1), Tensor(w3), Tensor(w2), tokens_per_local_expert_e
    )
    gates_Tk = Tensor(0.5 * not_dropped_Tk.asnumpy().astype(np.float32))
    combine = CombineTokens(TOP_K)
    y_TD = combine(y_RD, gates_Tk, assignment_R, slot_Tk, not_dropped_Tk)
    _, d_gates_Tk, *_ = combine.bprop(
        y_RD, gates_Tk, assignment_R, slot_Tk, not_dropped_Tk, y_TD, Tensor(dy_TD)
    )

    expected_TD = np.zeros_like(x_TD)
    for local, expert in enumerate(local_experts):
        for token in np.flatnonzero((expert == CHOSEN_TK).any(1) & valid):
            gate, up = w1[local] @ x_TD[token], w3[local] @ x_TD[token]
            expected_TD[token] += 0.5 * w2[local] @ (gate / (1 + np.exp(-gate)) * up)
    np.testing.assert_allclose(y_TD.asnumpy(), expected_TD, atol=1e-4)
    assert np.isfinite(d_gates_Tk.asnumpy()).all()
    assert (d_gates_Tk.asnumpy()[~not_dropped_Tk.asnumpy()] == 0).all()
