"""Router: choice, gates and losses against the oracle; jitter, uniform routing, collapse."""

import mindspore
import numpy as np
import pytest
from helpers.router_oracle import route
from helpers.routing import one_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops

from mixtral_ms.config.sections.model_section import MoEConfig
from mixtral_ms.model.moe.router import Router, RouterLosses
from mixtral_ms.parallel.grid.mesh import ProcessGroup

pytestmark = pytest.mark.usefixtures("pynative")

EXAMPLES = settings(max_examples=25)
TOLERANCE = 1e-5


@st.composite
def routing(draw, max_tokens=24):
    """(logits (T, E) without ties, k, valid tokens)."""
    experts = draw(st.integers(2, 16))
    k = draw(st.integers(1, min(4, experts)))
    tokens = draw(st.integers(1, max_tokens))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0]))
    logits_TE = logits_without_ties(draw(st.integers(0, 2**31)), tokens, experts, spread)
    valid_T = np.array(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return logits_TE, k, valid_T | (draw(st.booleans()))


def logits_without_ties(seed, tokens, experts, spread):
    """Rows of distinct values: shuffled steps, moved by less than half a step."""
    generator = np.random.default_rng(seed)
    ranks = generator.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    moved = ranks + generator.uniform(-0.3, 0.3, (tokens, experts))
    return (moved / experts * spread - spread / 3).astype(np.float32)


def router_of_logits(experts, k, layer=0, **config):
    """A router whose input is its logits: its weight is the identity."""
    moe = MoEConfig(expert_num=experts, num_experts_chosen=k, **config)
    router = Router(experts, moe, layer)
    router.dense.weight.set_data(Tensor(np.eye(experts, dtype=np.float32)))
    return router.set_train()


@EXAMPLES
@given(routing())
def test_choice_and_gates(case):
    logits_TE, k, _ = case
    expected = route(logits_TE, k, 0, False, np.ones(len(logits_TE), bool))
    gates, experts, probs, logits = router_of_logits(logits_TE.shape[1], k)(Tensor(logits_TE))
    np.testing.assert_array_equal(experts.asnumpy(), expected.experts)
    np.testing.assert_allclose(gates.asnumpy(), expected.gates, rtol=TOLERANCE)
    np.testing.assert_allclose(probs.asnumpy().sum(1), 1, rtol=TOLERANCE)
    np.testing.assert_array_equal(logits.asnumpy(), logits_TE)


@EXAMPLES
@given(routing())
def test_gates_are_the_softmax_of_the_chosen_logits(case):
    """softmax(topk(logits)) is the renormalised topk(softmax(logits)): axolotl issue 931."""
    logits_TE, k, _ = case
    gates = router_of_logits(logits_TE.shape[1], k)(Tensor(logits_TE))[0].asnumpy()
    top = -np.sort(-logits_TE.astype(np.float64), axis=1)[:, :k]
    exponentials = np.exp(top - top.max(1, keepdims=True))
    np.testing.assert_allclose(gates, exponentials / exponentials.sum(1, keepdims=True), 1e-5)


@EXAMPLES
@given(routing())
def test_losses_leave_padding_out(case):
    logits_TE, k, valid_T = case
    expected = route(logits_TE, k, 0, False, valid_T)
    _, _, *routing = router_of_logits(logits_TE.shape[1], k)(Tensor(logits_TE))
    counts = Tensor(expected.counts.astype(np.int32))
    factors = MoEConfig(
        expert_num=logits_TE.shape[1],
        num_experts_chosen=k,
        aux_loss_factor=0.5,
        z_loss_factor=0.25,
    )
    aux, z, *_ = one_layer(RouterLosses(factors), *routing, counts, counts, Tensor(valid_T))
    np.testing.assert_allclose(aux.asnumpy(), 0.5 * expected.aux, rtol=TOLERANCE, atol=1e-7)
    np.testing.assert_allclose(z.asnumpy(), 0.25 * expected.z, rtol=TOLERANCE, atol=1e-6)


def test_each_layer_has_its_own_losses():
    config = MoEConfig(expert_num=4, num_experts_chosen=2, aux_loss_factor=0.5, z_loss_factor=0.25)
    losses, valid = RouterLosses(config), Tensor(np.arange(12) % 5 > 0)
    layers = []
    for seed in range(3):
        logits_TE = logits_without_ties(seed, 12, 4, 4.0)
        _, chosen, *routing = router_of_logits(4, 2)(Tensor(logits_TE))
        counts = np.bincount(chosen.asnumpy()[valid.asnumpy()].ravel(), minlength=4)
        taken = np.minimum(counts, 4 + seed)
        layers.append((*routing, Tensor(counts.astype(np.int32)), Tensor(taken.astype(np.int32))))
    together = losses(*[ops.stack(one) for one in zip(*layers, strict=True)], valid)
    for number, layer in enumerate(layers):
        for whole, alone in zip(together, one_layer(losses, *layer, valid), strict=True):
            np.testing.assert_allclose(whole[number].asnumpy(), alone.asnumpy(), rtol=TOLERANCE)


def test_raw_gates_without_normalisation():
    logits_TE = logits_without_ties(3, 6, 5, 2.0)
    router = router_of_logits(5, 2, norm_topk_prob=False)
    gates, _, probs, _ = router(Tensor(logits_TE))
    np.testing.assert_array_equal(gates.asnumpy(), -np.sort(-probs.asnumpy(), axis=1)[:, :2])


@pytest.mark.parametrize("experts, k, tokens", [(8, 2, 32), (5, 2, 20), (3, 3, 7), (4, 1, 9)])
def test_uniform_routing(experts, k, tokens):
    logits_TE = logits_without_ties(1, tokens, experts, 8.0)
    expected = route(logits_TE, k, 0, False, np.ones(tokens, bool), uniform=True)
    gates, chosen, _, _ = router_of_logits(experts, k, uniform_routing=True)(Tensor(logits_TE))
    np.testing.assert_array_equal(chosen.asnumpy(), expected.experts)
    np.testing.assert_allclose(gates.asnumpy(), expected.gates, rtol=TOLERANCE)
    load = np.bincount(chosen.asnumpy().ravel(), minlength=experts)
    assert load.max() - load.min() <= 1


@pytest.mark.parametrize("ranks, batch, length", [(2, 3, 7), (3, 1, 4), (2, 2, 6)])
@pytest.mark.parametrize("switches", [{"uniform_routing": True}, {"router_jitter": 0.3}, {}])
def test_ranks_of_a_sequence_choose_as_one_process(ranks, batch, length, switches):
    """Each has its own part of the tokens, and none of these parts divides by the experts."""
    experts, k = 5, 2
    moe = MoEConfig(expert_num=experts, num_experts_chosen=k, **switches)
    logits_BWE = logits_without_ties(4, batch * ranks * length, experts, 8.0)
    logits_BWE = logits_BWE.reshape(batch, ranks * length, experts)

    def chosen(router, logits):
        router.dense.weight.set_data(Tensor(np.eye(experts, dtype=np.float32)))
        gates, chosen, *_ = router.set_train()(Tensor(logits.reshape(-1, experts)))
        return gates.asnumpy(), chosen.asnumpy()

    whole = [one.reshape(batch, -1, k) for one in chosen(Router(experts, moe, 0), logits_BWE)]
    for index in range(ranks):
        group = ProcessGroup(tuple(range(ranks)), index)
        router = Router(experts, moe, 0, group, (batch, length))
        part = slice(index * length, (index + 1) * length)
        gates, found = chosen(router, logits_BWE[:, part])
        np.testing.assert_array_equal(found, whole[1][:, part].reshape(-1, k))
        np.testing.assert_allclose(gates, whole[0][:, part].reshape(-1, k), rtol=TOLERANCE)


def noise(router, key, shape=(64, 64)):
    router.jitter_key.set_data(Tensor(key, mindspore.float32))
    return router._noise(ops.ones(shape, mindspore.float32)).asnumpy()


def test_jitter_is_a_function_of_key_and_layer():
    router = router_of_logits(8, 2, router_jitter=0.1)
    first = noise(router, 5.0)
    np.testing.assert_array_equal(first, noise(router, 5.0))
    assert not np.allclose(first, noise(router, 6.0))
    assert not np.allclose(first, noise(router_of_logits(8, 2, layer=1, router_jitter=0.1), 5.0))


@pytest.mark.parametrize("key", [0.0, 1.0, 977.0, 100000.0])
def test_jitter_is_uniform_and_unrelated_between_steps(key):
    router = router_of_logits(8, 2, router_jitter=0.1)
    values, following = noise(router, key), noise(router, key + 1)
    assert values.min() == pytest.approx(0.9, abs=1e-3)
    assert values.max() == pytest.approx(1.1, abs=1e-3)
    assert values.std(0).min() > 0.04 and values.std(1).min() > 0.04  # 0.058 when uniform
    deciles = np.histogram(values, bins=10, range=(0.9, 1.1))[0] / values.size
    assert np.abs(deciles - 0.1).max() < 0.02
    assert abs(np.corrcoef(values.ravel(), following.ravel())[0, 1]) < 0.1
    rows, columns = np.corrcoef(values), np.corrcoef(values.T)
    for correlation in (rows, columns):
        assert np.abs(correlation - np.eye(len(correlation))).max() < 0.7


def test_jitter_is_off_in_evaluation():
    logits_TE = Tensor(logits_without_ties(3, 6, 8, 2.0))
    router = router_of_logits(8, 2, router_jitter=0.3)
    assert not np.allclose(router(logits_TE)[3].asnumpy(), logits_TE.asnumpy())
    router.set_train(False)
    np.testing.assert_array_equal(router(logits_TE)[3].asnumpy(), logits_TE.asnumpy())


@pytest.mark.slow
def test_aux_loss_undoes_a_collapse():
    """All tokens start on expert 0; descent on the aux loss alone spreads them again."""
    experts, hidden, tokens = 4, 8, 128
    generator = np.random.default_rng(0)
    x_TD = generator.standard_normal((tokens, hidden)).astype(np.float32)
    x_TD[:, 0] = 1.0
    moe = MoEConfig(expert_num=experts, num_experts_chosen=1, aux_loss_factor=1.0)
    router, losses = Router(hidden, moe, 0), RouterLosses(moe)
    weight = 0.1 * generator.standard_normal((experts, hidden)).astype(np.float32)
    weight[0, 0] = 2.0
    router.dense.weight.set_data(Tensor(weight))
    valid = Tensor(np.ones(tokens, bool))

    def aux(x):
        _, chosen, probs, logits = router(x)
        counts = ops.bincount(chosen.reshape(-1), minlength=experts)
        return one_layer(losses, probs, logits, counts, counts, valid)[0], counts

    gradient = mindspore.value_and_grad(
        aux, None, mindspore.ParameterTuple([router.dense.weight]), has_aux=True
    )
    history = []
    for _ in range(40):
        (loss, counts), (step,) = gradient(Tensor(x_TD))
        history.append((float(loss), int(counts.max()) / tokens))
        router.dense.weight.set_data(router.dense.weight - 0.5 * step)
    assert history[0][1] == 1.0 and history[0][0] > 2.0
    assert history[-1][1] < 0.5 and history[-1][0] < 1.2
