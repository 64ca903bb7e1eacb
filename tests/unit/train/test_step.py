"""The training step: accumulation, clipping, recompute, overflow."""

import dataclasses
import functools

import mindspore
import numpy as np
import pytest
from helpers.tiny import random_ids, shifted, tiny_config

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.graphs.step_reads import counted_reads
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.totals import DeviceTotals, HostTotals
from mixtral_ms.train.step.train_step import TrainStep
from mixtral_ms.train.step.working_weights import WorkingWeights

TOLERANCE = 1e-5
RATE = 0.01


class Training:
    """A tiny network with its optimizer and step; keeps the gradients of each update."""

    def __init__(self, accumulation=1, recompute="", working=False, **changes):
        self.network = MixtralForCausalLM(tiny_config(**{"num_layers": 1, **changes}), seed=1)
        copied = None
        if working:
            twin = MixtralForCausalLM(self.network.config, share=self.network)
            copied = WorkingWeights(self.network, twin)
        if recompute == "layers":
            self.network.recompute_layers()
        elif recompute == "attention":
            self.network.recompute_attention(1)
        # A large eps: with a small one Adam turns the rounding of tiny gradients into whole steps.
        self.optimizer = AdamW(self.network.trainable_params(), eps=1e-2, weight_decay=0.1)
        self.step = TrainStep(self.network, self.optimizer, accumulation, working=copied)
        self.gradients = None
        self._update, self.optimizer.update = self.optimizer.update, self._keep_and_update
        self._start = self.weights()

    def restart(self, max_grad_norm=None):
        """The first weights and no moments, but what has been compiled stays."""
        self.load_weights(self._start)
        zeros = {n: np.zeros_like(v) for n, v in self.optimizer.state_tensors().items()}
        self.optimizer.load_state_tensors(zeros)
        self.optimizer.updates = 0
        self.step.totals = HostTotals(self.step.objective, self.optimizer.kernels)
        self.step.max_grad_norm = max_grad_norm
        return self

    def _keep_and_update(self, gradients, learning_rate, scale):
        names = [p.name for p in self.network.trainable_params()]
        values = [gradient.asnumpy() * scale for gradient in gradients]
        self.gradients = dict(zip(names, values, strict=True))
        self._update(gradients, learning_rate, scale)

    def weights(self):
        return {p.name: p.asnumpy().copy() for p in self.network.trainable_params()}

    def load_weights(self, values):
        for parameter in self.network.trainable_params():
            parameter.set_data(mindspore.Tensor(values[parameter.name]))


ADAPTERS = {"lora_rank": 4, "target_modules": ".*wq|.*w1"}
ROUTER = {"aux_loss_factor": 0.5, "z_loss_factor": 0.1, "capacity_factor": 0.6}
KINDS = {
    "plain": {},
    "four micro batches": {"accumulation": 4},
    "one large batch": {"batch_size": 8},
    "two micro batches with router losses": {"accumulation": 2, "moe_config": ROUTER},
    "float16": {"compute_dtype": "float16"},
}


@functools.cache
def _compiled(kind):
    return Training(**KINDS[kind])


def training(kind="plain", **options):
    """Compiled once for all tests."""
    return _compiled(kind).restart(**options)


def batch_of(rows, supervised, seed, padded=0):
    """Rows of which the first `supervised` positions have a target and the last are padding."""
    ids = random_ids(tiny_config(), seed, rows)
    labels = shifted(ids)
    labels[:, supervised:] = -100
    if padded:
        ids[:, -padded:] = 0
    return Batch(ids, labels)


def joined(batches):
    ids, labels = [b.input_ids for b in batches], [b.labels for b in batches]
    return Batch(np.concatenate(ids), np.concatenate(labels))


def compare_all(record_error, got, expected):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        record_error(name, value, expected[name], TOLERANCE)


def test_accumulation_equals_one_large_batch(graph, record_error):
    """Micro batches with 2 to 30 supervised tokens: a mean of their means would be wrong."""
    supervised = (15, 1, 7, 3)
    micro = [batch_of(2, n, seed, padded=min(4, 15 - n)) for seed, n in enumerate(supervised)]
    parts, whole = training("four micro batches"), training("one large batch")
    for _ in range(2):  # the second step sees what the first left in the sums
        got, expected = parts.step(micro, RATE), whole.step([joined(micro)], RATE)
        assert got.tokens == expected.tokens == 2 * sum(supervised)
        record_error("loss", got.loss, expected.loss, TOLERANCE)
        record_error("norm", got.grad_norm, expected.grad_norm, TOLERANCE)
        compare_all(record_error, parts.gradients, whole.gradients)
        compare_all(record_error, parts.weights(), whole.weights())


@pytest.mark.slow
def test_router_losses_and_statistics_of_micro_batches_are_averaged(graph):
    """And not divided by the number of supervised tokens."""
    trained = training("two micro batches with router losses")
    first, second = batch_of(2, 15, 0), batch_of(2, 2, 1)
    alone = [trained.step([batch, batch], 0.0) for batch in (first, second)]
    both = trained.step([first, second], 0.0)
    for name in ("aux_loss", "z_loss"):
        expected = np.mean([one.parts[name] for one in alone])
        assert both.parts[name] == pytest.approx(expected, rel=1e-6)
    assert both.loss == pytest.approx(sum(both.parts.values()))
    for field in ("expert_load", "drop_percent", "router_entropy"):
        expected = np.mean([getattr(r, field) for r in alone], axis=0)
        np.testing.assert_allclose(getattr(both, field), expected, rtol=1e-5, atol=1e-6)
    assert alone[0].parts["aux_loss"] != alone[1].parts["aux_loss"]
    assert min(both.drop_percent) > 5


def test_clipping(graph, record_error):
    batch, gradients, results, weights = batch_of(2, 15, 0), {}, [], {}
    for limit in (None, 0.05, 1e6):
        trained = training(max_grad_norm=limit)
        results.append(trained.step([batch], RATE))
        gradients[limit], weights[limit] = trained.gradients, trained.weights()
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients[None].values()))
    for result in results:  # what is reported is the norm before clipping
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.05
    expected = {name: value * 0.05 / norm for name, value in gradients[None].items()}
    compare_all(record_error, gradients[0.05], expected)
    compare_all(record_error, weights[1e6], weights[None])


@pytest.mark.parametrize("loss_scale", [1024.0, 0.5])
def test_a_loss_scale_cancels_out(loss_scale, graph, record_error):
    batch = batch_of(2, 9, 0)
    trained = training(max_grad_norm=0.5)
    expected, weights = trained.step([batch], RATE), trained.weights()
    trained = training(max_grad_norm=0.5)
    got = trained.step([batch], RATE, loss_scale)
    record_error("norm", got.grad_norm, expected.grad_norm, TOLERANCE)
    assert got.loss == expected.loss
    compare_all(record_error, trained.weights(), weights)


@pytest.mark.parametrize(
    "kind, accumulation, too_large",
    # float32 holds any finite scale
    [("float16", 1, 2.0**40), ("four micro batches", 4, np.inf)],
)
@pytest.mark.slow
def test_an_overflow_leaves_weights_and_moments_alone(kind, accumulation, too_large, graph):
    trained = training(kind)
    batches = [batch_of(2, 15, seed) for seed in range(accumulation)]
    trained.step(batches, RATE, 64.0)
    weights = trained.weights()
    moments = {name: value.copy() for name, value in trained.optimizer.state_tensors().items()}

    assert trained.step(batches, RATE, too_large).skipped
    assert trained.optimizer.updates == 1
    for name, value in trained.weights().items():
        np.testing.assert_array_equal(value, weights[name])
    for name, value in trained.optimizer.state_tensors().items():
        np.testing.assert_array_equal(value, moments[name])
    assert trained.step.first_non_finite_gradient() in weights

    # nothing of the overflow is left in the sums of the gradients
    result = trained.step(batches, RATE, 64.0)
    assert not result.skipped and np.isfinite(result.grad_norm)
    assert trained.optimizer.updates == 2
    assert trained.step.first_non_finite_gradient() is None
    after = trained.weights()
    assert any((after[name] != weights[name]).any() for name in weights)
    assert all(np.isfinite(value).all() for value in after.values())


def test_a_weight_that_is_not_a_number_skips_the_step(graph):
    trained = training()
    weights = trained.weights()
    weights["model.layers.0.ffn_norm.weight"][3] = np.nan
    trained.load_weights(weights)
    assert trained.step([batch_of(2, 15, 0)], RATE).skipped
    assert trained.optimizer.updates == 0
    assert trained.step.first_non_finite_gradient() in weights


def test_float16_trains(graph):
    batch = batch_of(2, 15, 0)
    losses = {}
    for kind in ("float16", "plain"):
        trained = training(kind)
        losses[kind] = [trained.step([batch], RATE, 128.0).loss for _ in range(5)]
    assert losses["float16"][-1] < losses["float16"][0] - 0.1
    np.testing.assert_allclose(losses["float16"], losses["plain"], rtol=0.02)


def test_nothing_supervised_moves_nothing_but_the_decay(graph):
    trained = training()
    before = trained.weights()
    result = trained.step([batch_of(2, 0, 0)], RATE)
    assert result.loss == 0.0 and result.grad_norm == 0.0 and not result.skipped
    for name, value in trained.weights().items():
        factor = 1 - RATE * 0.1 if value.ndim > 1 else 1.0
        np.testing.assert_allclose(value, before[name] * factor, rtol=1e-5)


@pytest.mark.parametrize("supervised", [(15, 2), (0, 0)])
def test_totals_added_on_the_device_are_those_of_the_host(supervised, graph, record_error):
    batches = [batch_of(2, count, seed) for seed, count in enumerate(supervised)]
    found = {}
    for kind in (HostTotals, DeviceTotals):
        trained = training("two micro batches with router losses", max_grad_norm=0.05)
        trained.step.totals = kind(trained.step.objective, trained.optimizer.kernels)
        with counted_reads() as reads:
            result = trained.step(batches, RATE, 4.0)
            found[kind] = dataclasses.asdict(result), trained.weights(), reads()
    (got, weights, reads), (expected, wanted, many) = found[DeviceTotals], found[HostTotals]
    assert reads < many
    assert (got.pop("tokens"), got.pop("skipped")) == (2 * sum(supervised), False)
    got |= got.pop("parts")
    for name, value in got.items():
        record_error(name, np.array(value), np.array((expected | expected["parts"])[name]), 1e-6)
    compare_all(record_error, weights, wanted)


def test_an_overflow_is_seen_in_totals_of_the_device(graph):
    trained = training("four micro batches")
    trained.step.totals = DeviceTotals(trained.step.objective, trained.optimizer.kernels)
    before = trained.weights()
    assert trained.step([batch_of(2, 15, seed) for seed in range(4)], RATE, np.inf).skipped
    for name, value in trained.weights().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    "accumulation, changes", [(2, {"pet_config": ADAPTERS}), (1, {"tie_word_embeddings": True})]
)
@pytest.mark.slow
def test_working_weights_give_what_weights_cast_each_time_give(accumulation, changes, graph):
    batches = [batch_of(2, 9 - seed, seed) for seed in range(accumulation)]
    found = []
    for working in (False, True):
        trained = Training(accumulation, working=working, compute_dtype="float16", **changes)
        losses = [trained.step(batches, RATE, 64.0).loss for _ in range(2)]
        found.append((losses, trained.weights()))
    (expected, weights), (got, working_weights) = found
    assert got == expected and got[0] != got[1]
    for name, value in working_weights.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_which_weights_have_a_copy(pynative):
    trained = Training(working=True, compute_dtype="float16")
    own = {one.name: one.dtype for one in trained.step.objective.network.get_parameters()}
    kept = {name for name, dtype in own.items() if dtype == mindspore.float32}
    layer, attention = "model.layers.0.", ("wq", "wk", "wv", "wo")
    cast = {f"{layer}attention.{name}.weight" for name in attention} | {"lm_head.weight"}
    cast |= {f"{layer}feed_forward.routed_experts.ffn.{name}.weight" for name in ("w1", "w2", "w3")}
    assert own.keys() - kept == cast
    assert all(one.dtype == mindspore.float32 for one in trained.network.get_parameters())


def test_a_wrong_number_of_micro_batches_is_refused(graph):
    with pytest.raises(ValueError, match="3 micro batches given, 4 expected"):
        training("four micro batches").step([batch_of(2, 15, 0)] * 3, RATE)


@pytest.mark.slow
def test_graph_mode_recompute_and_pynative_agree(graph, record_error):
    """With jitter, which recomputing must repeat."""
    moe = {"router_jitter": 0.2, "aux_loss_factor": 0.1, "capacity_factor": 1.0}
    batches = [batch_of(2, 15, 0, padded=1), batch_of(2, 4, 1)]
    runs = {}
    for name, mode, recompute in (
        ("graph", mindspore.GRAPH_MODE, ""),
        ("recompute", mindspore.GRAPH_MODE, "layers"),
        ("select_recompute", mindspore.GRAPH_MODE, "attention"),
        ("pynative", mindspore.PYNATIVE_MODE, ""),
    ):
        mindspore.set_context(mode=mode)  # the fixture sets it back
        trained = Training(2, recompute, moe_config=moe)
        runs[name] = (trained, [trained.step(batches, RATE) for _ in range(2)])
    reference, expected = runs["pynative"]
    for name in ("graph", "recompute", "select_recompute"):
        trained, results = runs[name]
        for got, wanted in zip(results, expected, strict=True):
            record_error(f"{name} loss", got.loss, wanted.loss, TOLERANCE)
            record_error(f"{name} norm", got.grad_norm, wanted.grad_norm, TOLERANCE)
        compare_all(record_error, trained.gradients, reference.gradients)
        compare_all(record_error, trained.weights(), reference.weights())


def test_each_micro_batch_is_announced_before_it_runs(graph):
    seen = []
    trained = training("four micro batches")
    trained.step([batch_of(2, 15, i) for i in range(4)], RATE, before=seen.append)
    assert seen == [0, 1, 2, 3]
