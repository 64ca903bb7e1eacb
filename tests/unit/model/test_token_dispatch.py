"""Slots, drops and the combined output against the oracle, in every layout and gradient."""

import dataclasses
from functools import partial

import mindspore
import numpy as np
import pytest
import torch
from helpers.kernels import cpp_kernels
from helpers.router_oracle import capacity_of, hand_out_slots, moe, route
from helpers.routing import one_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.model.moe.routed_experts import RoutedExperts
from mixtral_ms.model.moe.router import RouterLosses
from mixtral_ms.model.moe.token_dispatch import Dispatch, expert_capacity
from mixtral_ms.parallel.grid.mesh import Mesh

pytestmark = pytest.mark.usefixtures("pynative")

HIDDEN, INTERMEDIATE = 6, 5
TOLERANCE = 1e-5


@given(
    st.integers(1, 500),
    st.integers(1, 4),
    st.integers(1, 64),
    st.floats(0.01, 20.0),
    st.sampled_from([1, 2, 4, 8]),
)
def test_capacity_formula(tokens, k, experts, factor, parallel):
    got = expert_capacity(tokens, k, experts, factor, parallel)
    assert got == capacity_of(tokens, k, experts, factor, parallel)


@st.composite
def assignments(draw):
    """(chosen (T, k), experts, valid tokens, capacity or None, sdrop)."""
    experts = draw(st.integers(2, 16))
    k = draw(st.integers(1, min(4, experts)))
    tokens = draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    # from even to all tokens on the same experts
    preference = generator.standard_normal(experts) * draw(st.sampled_from([0.0, 2.0, 50.0]))
    scores = generator.standard_normal((tokens, experts)) + preference
    chosen_Tk = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    valid_T = generator.random(tokens) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    factor = draw(st.sampled_from([None, 0.3, 1.0, 1.25, 4.0]))
    capacity = None if factor is None else capacity_of(tokens, k, experts, factor)
    return chosen_Tk, experts, valid_T, capacity, draw(st.booleans())


@settings(max_examples=40)
@given(assignments(), st.sampled_from(["packed", "padded"]))
def test_every_assignment_has_its_own_slot_or_is_dropped(case, layout):
    chosen_Tk, experts, valid_T, capacity, sdrop = case
    if layout == "padded" and capacity is None:
        capacity = len(chosen_Tk)
    dispatch = Dispatch(experts, capacity, sdrop, layout)
    valid_Tk = np.repeat(valid_T[:, None], chosen_Tk.shape[1], 1)
    placed = dispatch(Tensor(chosen_Tk), Tensor(valid_Tk))
    slot_Tk, not_dropped_Tk, assignment_R, used_E, chosen_E, kept_E = (
        one.asnumpy() for one in placed
    )

    np.testing.assert_array_equal(kept_E, used_E)
    expected_kept = hand_out_slots(chosen_Tk, experts, capacity, sdrop, valid_T)
    np.testing.assert_array_equal(not_dropped_Tk, expected_kept)
    before = np.bincount(chosen_Tk[valid_T].ravel(), minlength=experts)
    np.testing.assert_array_equal(chosen_E, before)
    np.testing.assert_array_equal(used_E, np.bincount(chosen_Tk[not_dropped_Tk], minlength=experts))
    assert len(assignment_R) == dispatch.slots(chosen_Tk.size)
    # the two index tables are each other's inverse, so no slot is used twice
    kept = np.flatnonzero(not_dropped_Tk)
    np.testing.assert_array_equal(assignment_R[slot_Tk.ravel()[kept]], kept)
    assert (assignment_R >= 0).sum() == len(kept)
    starts_E = group_starts(layout, used_E, capacity)
    queue_slot_Tk = slot_Tk - starts_E[chosen_Tk]
    assert (queue_slot_Tk[not_dropped_Tk] >= 0).all()
    assert (queue_slot_Tk[not_dropped_Tk] < used_E[chosen_Tk][not_dropped_Tk]).all()


@settings(max_examples=40)
@given(assignments(), st.data())
def test_slots_only_for_local_experts(case, data):
    """Capacity is handed out among all experts; the slots of local ones follow each other."""
    chosen_Tk, experts, valid_T, capacity, sdrop = case
    local_experts = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    dispatch = Dispatch(experts, capacity, sdrop, "packed", local_experts)
    valid_Tk = np.repeat(valid_T[:, None], chosen_Tk.shape[1], 1)
    placed = dispatch(Tensor(chosen_Tk), Tensor(valid_Tk))
    slot_Tk, not_dropped_Tk, assignment_R, used_e, chosen_E, kept_E = (
        one.asnumpy() for one in placed
    )

    kept_Tk = hand_out_slots(chosen_Tk, experts, capacity, sdrop, valid_T)
    np.testing.assert_array_equal(not_dropped_Tk, kept_Tk & np.isin(chosen_Tk, local_experts))
    before = np.bincount(chosen_Tk[valid_T].ravel(), minlength=experts)
    np.testing.assert_array_equal(chosen_E, before)
    np.testing.assert_array_equal(kept_E, np.bincount(chosen_Tk[kept_Tk], minlength=experts))
    np.testing.assert_array_equal(used_e, kept_E[local_experts])
    used = np.sort(slot_Tk[not_dropped_Tk])
    np.testing.assert_array_equal(used, np.arange(used_e.sum()))
    by_slot = chosen_Tk.ravel()[assignment_R[: used_e.sum()]]
    np.testing.assert_array_equal(by_slot, np.repeat(local_experts, used_e))


def group_starts(layout, used_E, capacity):
    if layout == "padded":
        return np.arange(len(used_E)) * capacity
    return np.concatenate([[0], np.cumsum(used_E)[:-1]])


@dataclasses.dataclass
class Layer:
    """One MoE layer whose router logits are the first E entries of its input."""

    cell: RoutedExperts
    losses: RouterLosses
    config: MoEConfig
    weights: tuple

    @classmethod
    def build(cls, tokens, kind, seed=0, hidden=HIDDEN, **moe_config):
        config = MoEConfig(**moe_config)
        kernels = KERNELS_OF[kind]()
        model = MixtralConfig(
            hidden_size=hidden,
            num_heads=1,
            intermediate_size=INTERMEDIATE,
            moe_config=config,
        )
        cell = RoutedExperts(model, 0, (1, tokens), kernels, mstype.float32, Mesh()).set_train()
        generator = np.random.default_rng(seed)
        shapes = {"w1": (INTERMEDIATE, hidden), "w3": (INTERMEDIATE, hidden)}
        shapes["w2"] = (hidden, INTERMEDIATE)
        weights = {}
        for name, shape in shapes.items():
            value = generator.standard_normal((config.expert_num, *shape)).astype(np.float32)
            getattr(cell.ffn, name).weight.set_data(Tensor(value))
            weights[name] = value
        gate = np.eye(config.expert_num, hidden, dtype=np.float32)
        cell.router.dense.weight.set_data(Tensor(gate))
        weights = (weights["w1"], weights["w3"], weights["w2"])
        return cls(cell, RouterLosses(config), config, weights)

    def __call__(self, x_TD, valid_T):
        """The layer's output, then what `RouterLosses` says of it."""
        y_TD, routing = self.cell(x_TD, x_TD, valid_T)
        return y_TD, *one_layer(self.losses, *routing, valid_T)

    def expected(self, x_TD, valid_T):
        logits_TE = x_TD[:, : self.config.expert_num]
        routed = route(
            logits_TE,
            self.config.num_experts_chosen,
            self.config.capacity_factor,
            self.config.enable_sdrop,
            valid_T,
            self.config.uniform_routing,
        )
        return routed, moe(x_TD, routed, *self.weights)


KERNELS_OF = {
    "C++": cpp_kernels,
    "numpy": partial(select_kernels, "numpy", dropless=True),
    "packed": partial(select_kernels, "plain", dropless=True),
    "padded": partial(select_kernels, "plain", dropless=False),
}


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 30),
    k=st.integers(1, 4),
    factor=st.sampled_from([0.3, 1.0, 1.25, 100.0]),
    sdrop=st.booleans(),
    real=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("kind", KERNELS_OF)
@pytest.mark.slow
def test_layer_output(kind, tokens, k, factor, sdrop, real, seed):
    generator = np.random.default_rng(seed)
    # Offsets of the logits make the load uneven, so that experts overflow or stay empty.
    x_TD = generator.standard_normal((tokens, HIDDEN)) + 2 * generator.standard_normal(HIDDEN)
    check_output(
        kind,
        x_TD.astype(np.float32),
        generator.random(tokens) < real,
        expert_num=4,
        num_experts_chosen=k,
        capacity_factor=factor,
        enable_sdrop=sdrop,
        aux_loss_factor=1.0,
        z_loss_factor=1.0,
    )


@pytest.mark.parametrize("kind", ["C++", "numpy"])
@pytest.mark.parametrize(
    "load", ["even", "all to one", "one stays empty", "uniform switch", "only padding"]
)
def test_dropless_layer_over_several_blocks(kind, load):
    """DeepSpeed issues 4808 and 5008: no load may hang, fail or lose a token."""
    tokens = 3 * 128 + 5  # a block of tokens has 128
    x_TD = np.random.default_rng(1).standard_normal((tokens, HIDDEN)).astype(np.float32)
    if load == "all to one":
        x_TD[:, 2] += 30
    if load == "one stays empty":
        x_TD[:, 1] -= 30
    valid_T = np.full(tokens, load != "only padding")
    routed = check_output(
        kind,
        x_TD,
        valid_T,
        expert_num=4,
        num_experts_chosen=1 if load == "all to one" else 2,
        uniform_routing=load == "uniform switch",
    )
    assert routed.kept.all() == (load != "only padding")
    if load == "all to one":
        assert routed.counts.tolist() == [0, 0, tokens, 0]
    if load == "one stays empty":
        assert routed.counts[1] == 0


def check_output(kind, x_TD, valid_T, **moe_config):
    layer = Layer.build(len(x_TD), kind, **moe_config)
    routed, expected = layer.expected(x_TD, valid_T)
    outputs = layer(Tensor(x_TD), Tensor(valid_T))
    y_TD, aux, z, load_E, dropped, _ = (value.asnumpy() for value in outputs)
    np.testing.assert_allclose(y_TD, expected, atol=TOLERANCE * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(aux, layer.config.aux_loss_factor * routed.aux, rtol=TOLERANCE)
    np.testing.assert_allclose(z, layer.config.z_loss_factor * routed.z, rtol=TOLERANCE)
    total = max(1, routed.counts.sum())
    np.testing.assert_allclose(load_E, routed.counts / total, atol=1e-6)
    lost = routed.counts.sum() - routed.kept.sum()
    np.testing.assert_allclose(dropped, lost / total, atol=1e-6)
    return routed


@pytest.mark.parametrize("kind", KERNELS_OF)
@pytest.mark.parametrize("sdrop", [True, False], ids=["sdrop", "kdrop"])
@pytest.mark.parametrize("factor", [0.6, 100.0], ids=["drops", "keeps all"])
def test_gradients(kind, sdrop, factor, record_error):
    """Against torch's autograd on the same rules, drops held fixed, padding present."""
    tokens, k, experts = 23, 2, 4
    generator = np.random.default_rng(5)
    x_TD = generator.standard_normal((tokens, HIDDEN)).astype(np.float32)
    x_TD[:, 0] += 1.5
    valid_T = generator.random(tokens) < 0.8
    towards_TD = generator.standard_normal((tokens, HIDDEN)).astype(np.float32)
    layer = Layer.build(
        tokens,
        kind,
        expert_num=experts,
        num_experts_chosen=k,
        capacity_factor=factor,
        enable_sdrop=sdrop,
        aux_loss_factor=0.7,
        z_loss_factor=0.3,
    )
    routed, _ = layer.expected(x_TD, valid_T)
    assert (routed.kept.sum() < k * valid_T.sum()) == (factor < 1)

    def objective(x):
        y, aux, z, *_ = layer(x, Tensor(valid_T))
        return (y * Tensor(towards_TD)).sum() + aux + z

    parameters = mindspore.ParameterTuple(layer.cell.trainable_params())
    value, (d_x, d_parameters) = mindspore.value_and_grad(objective, 0, parameters)(Tensor(x_TD))
    expected_value, expected = torch_gradients(layer, x_TD, valid_T, routed, towards_TD)
    record_error("value", value.asnumpy(), expected_value, TOLERANCE)
    record_error("x", d_x.asnumpy(), expected["x"], TOLERANCE)
    for parameter, gradient in zip(parameters, d_parameters, strict=True):
        key = next(name for name in ("w1", "w2", "w3", "router") if name in parameter.name)
        record_error(parameter.name, gradient.asnumpy(), expected[key], TOLERANCE)


def torch_gradients(layer, x_TD, valid_T, routed, towards_TD):
    """float64 autograd with the choice and the drops of the oracle as constants."""
    w1, w3, w2 = layer.weights
    leaves = {"x": x_TD, "w1": w1, "w3": w3, "w2": w2}
    leaves["router"] = np.eye(len(w1), x_TD.shape[1])
    leaves = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in leaves.items()
    }
    logits = leaves["x"] @ leaves["router"].T
    probabilities = logits.softmax(1)
    gates = probabilities.gather(1, torch.tensor(routed.experts))
    gates = gates / gates.sum(1, keepdim=True) * torch.tensor(routed.kept)
    every = torch.einsum("efd,td->tef", leaves["w1"], leaves["x"])
    every = torch.nn.functional.silu(every) * torch.einsum("efd,td->tef", leaves["w3"], leaves["x"])
    every = torch.einsum("edf,tef->ted", leaves["w2"], every)
    picked = torch.stack([every[t, row] for t, row in enumerate(torch.tensor(routed.experts))])
    y = (picked * gates[:, :, None]).sum(1)
    real = torch.tensor(valid_T)
    share = torch.tensor(routed.counts / routed.counts.sum())
    aux = 0.7 * len(w1) * (share * probabilities[real].mean(0)).sum()
    z = 0.3 * logits[real].logsumexp(1).square().mean()
    total = (y * torch.tensor(towards_TD)).sum() + aux + z
    total.backward()
    return total.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}
