"""Operators in numpy that read weights where they lie, and keep what their backward reads."""

import gc
import weakref

import mindspore
import numpy as np
import pytest
from helpers.tiny import random_ids, shifted, tiny_config
from mindspore import Tensor

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.kernels import select
from mixtral_ms.kernels.threaded import numpy_cross_entropy, numpy_experts
from mixtral_ms.kernels.threaded.numpy_cross_entropy import InPlaceCrossEntropy
from mixtral_ms.kernels.threaded.numpy_experts import InPlaceExperts
from mixtral_ms.kernels.threaded.saved_activations import NO_TICKET, Kept
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.objectives.causal_lm import CausalLMLoss, CausalLMObjective
from mixtral_ms.train.step.gradients import MicroBatchGradients

TOLERANCE = 1e-5


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def without_compiler(monkeypatch):
    """Kernels of a machine without a C++ compiler."""
    monkeypatch.setattr(select, "native_library", lambda: None)


@pytest.fixture
def computed(monkeypatch):
    """Names of the forwards that ran, in their order."""
    calls = []

    def counted(module, name):
        function = getattr(module, name)

        def run(*args):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, run)

    counted(numpy_experts, "numpy_experts_forward")
    counted(numpy_cross_entropy, "loss")
    counted(numpy_cross_entropy, "loss_and_gradients")
    return calls


def test_a_ticket_is_good_for_the_last_forward_and_once():
    kept, arrays = Kept(), [random(i, 3) for i in range(2)]
    first = kept.keep(arrays[1], arrays[0])
    second = kept.keep(*arrays)
    assert kept.take(first) is None
    assert kept.take(NO_TICKET) is None
    for got, expected in zip(kept.take(second), arrays, strict=True):
        assert got is expected
    assert kept.take(second) is None


def test_what_is_dropped_is_gone():
    kept = Kept()
    ticket = kept.keep(random(1, 3), random(2, 3))
    kept.drop()
    assert kept.take(ticket) is None


def experts(keeping):
    """A kernel, and two inputs of its forward with the gradient of what they give."""
    weights = random(1, 3, 10, 6), random(2, 3, 10, 6), random(3, 3, 6, 10)
    sizes = np.array([4, 0, 5], np.int32)
    inputs = [((random(i, 9, 6), sizes), random(i + 2, 9, 6)) for i in (4, 5)]
    return InPlaceExperts(lambda: weights, lambda: keeping), inputs


def cross_entropy(keeping):
    weight = random(1, 70, 6)
    labels = np.arange(9, dtype=np.int32) * 8 - 1
    inputs = [((random(i, 9, 6), labels), np.array([1.0 + i], np.float32)) for i in (4, 5)]
    return InPlaceCrossEntropy(lambda: weight, lambda: keeping), inputs


@pytest.mark.parametrize("kernel_of", [experts, cross_entropy])
def test_the_last_forward_is_not_computed_again(kernel_of, computed):
    kernel, [(inputs, towards), _] = kernel_of(keeping=True)
    _, ticket = kernel.forward(*inputs)
    assert len(computed) == 1
    kernel.backward(*inputs, ticket, towards)
    assert len(computed) == 1


@pytest.mark.parametrize("kernel_of", [experts, cross_entropy])
def test_a_backward_is_that_of_its_own_forward(kernel_of):
    """Whatever ran since, and however often it is asked for: what is gone is computed again."""
    expected = []
    for i in range(2):
        kernel, pairs = kernel_of(keeping=True)
        inputs, towards = pairs[i]
        _, ticket = kernel.forward(*inputs)
        expected.append(kernel.backward(*inputs, ticket, towards))
    for keeping in (True, False):
        kernel, pairs = kernel_of(keeping)
        tickets = [kernel.forward(*inputs)[1] for inputs, _ in pairs]
        for i in (1, 0, 1):
            inputs, towards = pairs[i]
            for got, wanted in zip(
                kernel.backward(*inputs, tickets[i], towards), expected[i], strict=True
            ):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("again", [False, True], ids=["not again", "again"])
def test_layers_with_one_place_for_all(again, computed):
    """Whether or not the graph runs a layer's forward once more before its backward."""
    kept, expected, layers = Kept(), [], []
    for i in range(2):
        alone, pairs = experts(keeping=True)
        inputs, towards = pairs[i]
        expected.append(alone.backward(*inputs, alone.forward(*inputs)[1], towards))
        layers.append((experts(keeping=True)[0], inputs, towards))
        layers[i][0].kept = kept
    computed.clear()
    tickets = [layer.forward(*inputs)[1] for layer, inputs, _ in layers]
    for i in (1, 0):
        layer, inputs, towards = layers[i]
        ticket = layer.forward(*inputs)[1] if again else tickets[i]
        for got, wanted in zip(layer.backward(*inputs, ticket, towards), expected[i], strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert len(computed) == (4 if again else 3)


def batch_of(seed):
    ids = random_ids(tiny_config(), seed)
    labels = shifted(ids)
    labels[0, :5] = -100
    return Batch(ids, labels)


def gradients_of(network, batches):
    network.set_train()
    gradients = MicroBatchGradients(CausalLMObjective(network), len(batches), shards={})
    weights = Tensor(0.1, mindspore.float32), Tensor(0.5, mindspore.float32)
    outputs, sums = gradients(batches, weights, lambda index: None)
    return [float(parts[0]) for parts in outputs], [one.asnumpy().copy() for one in sums]


@pytest.mark.parametrize(
    "mode, recompute, tied",
    [("GRAPH", False, True), ("GRAPH", True, False), ("PYNATIVE", False, False)],
)
@pytest.mark.slow
def test_training(  # noqa: PLR0913, PLR0917
    mode, recompute, tied, graph, without_compiler, computed, record_error
):
    """Two micro batches: as with plain operators, and each backward finds what it reads."""
    config = tiny_config(tie_word_embeddings=tied)
    batches = [batch_of(i) for i in range(2)]
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    reference = gradients_of(MixtralForCausalLM(config, seed=1, backend="plain"), batches)
    mindspore.set_context(mode=getattr(mindspore, f"{mode}_MODE"))  # the fixture sets it back
    network = MixtralForCausalLM(config, seed=1)
    assert network.kernel_name == "numpy"
    if recompute:
        network.recompute_layers()
    computed.clear()
    losses, gradients = gradients_of(network, batches)
    record_error("loss", np.array(losses), np.array(reference[0]), TOLERANCE)
    for parameter, got, expected in zip(
        network.trainable_params(), gradients, reference[1], strict=True
    ):
        record_error(parameter.name, got, expected, TOLERANCE)
    once = len(batches) * config.num_layers
    # Recomputed, all layers but the last, whose backward comes right after its forward.
    assert computed.count("numpy_experts_forward") == (
        2 * once - len(batches) if recompute else once
    )
    assert computed.count("loss_and_gradients") == len(batches)
    assert "loss" not in computed


@pytest.mark.parametrize("mode", ["GRAPH", "PYNATIVE"])
def test_without_training_nothing_is_kept(mode, graph, without_compiler, computed):
    mindspore.set_context(mode=getattr(mindspore, f"{mode}_MODE"))
    network = MixtralForCausalLM(tiny_config(), seed=1)
    network.set_train(False)
    batch = batch_of(1)
    loss = CausalLMLoss(network)(Tensor(batch.input_ids), Tensor(batch.labels))[0]
    loss.asnumpy()  # PyNative computes later than it returns
    assert computed == ["numpy_experts_forward"] * 2 + ["loss"]
    for layer in network.model.layers:
        kept = layer.feed_forward.routed_experts.experts.network.kernel.kept
        assert not kept._arrays


def test_a_network_that_shares_parameters_reads_those(pynative, without_compiler):
    network = MixtralForCausalLM(tiny_config(), seed=1)
    other = MixtralForCausalLM(tiny_config(), share=network)
    batch = [Tensor(one) for one in (batch_of(1).input_ids, batch_of(1).labels)]
    loss, same = CausalLMLoss(network), CausalLMLoss(other)
    np.testing.assert_array_equal(loss(*batch)[0].asnumpy(), same(*batch)[0].asnumpy())
    head = network.lm_head.weight
    head.set_data(Tensor(np.zeros(head.shape, np.float32)))
    tokens = batch_of(1).supervised_tokens
    np.testing.assert_allclose(float(same(*batch)[1]) / tokens, np.log(61), 1e-5)


def test_a_network_ends_with_its_last_reference(pynative, without_compiler):
    """MindSpore keeps every function that is an operator."""
    network = MixtralForCausalLM(tiny_config(), seed=1)
    weight = weakref.ref(network.model.layers[0].feed_forward.routed_experts.ffn.w1.weight)
    del network
    gc.collect()
    assert weight() is None


def test_a_label_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="label 5 in a vocabulary of 5"):
        numpy_cross_entropy.loss(random(1, 2, 3), random(2, 5, 3), np.array([5, -1], np.int32))
