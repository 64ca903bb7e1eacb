"""The training step: accumulation, clipping, recompute, overflow."""

import mindspore
import numpy as np
import pytest
from helpers.tiny import random_ids, shifted, tiny_config

from mixtral_ms.data.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.optimizer import AdamW
from mixtral_ms.train.step import TrainStep

TOLERANCE = 1e-5
RATE = 0.01


class Training:
    """A tiny network with its optimizer and step; keeps the gradients of each update."""

    def __init__(self, accumulation=1, max_grad_norm=None, recompute=False, **changes):
        self.config = tiny_config(**changes)
        self.network = MixtralForCausalLM(self.config, seed=1)
        if recompute:
            self.network.recompute_layers()
        # A large eps: with a small one Adam turns the rounding of tiny gradients into whole steps.
        self.optimizer = AdamW(self.network.trainable_params(), eps=1e-2, weight_decay=0.1)
        self.step = TrainStep(self.network, self.optimizer, accumulation, max_grad_norm)
        self.gradients = None
        self._update, self.optimizer.update = self.optimizer.update, self._keep_and_update

    def _keep_and_update(self, gradients, learning_rate, scale):
        names = [p.name for p in self.network.trainable_params()]
        values = [gradient.asnumpy() * scale for gradient in gradients]
        self.gradients = dict(zip(names, values, strict=True))
        self._update(gradients, learning_rate, scale)

    def weights(self):
        return {p.name: p.asnumpy().copy() for p in self.network.trainable_params()}


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


def test_accumulation_equals_one_large_batch(pynative, record_error):
    """Micro batches with 2 to 30 supervised tokens: a mean of their means would be wrong."""
    supervised = (15, 1, 7, 3)
    micro = [batch_of(2, n, seed, padded=min(4, 15 - n)) for seed, n in enumerate(supervised)]
    parts, whole = Training(accumulation=4), Training(batch_size=8)
    for _ in range(2):  # the second step sees what the first left in the sums
        got, expected = parts.step(micro, RATE), whole.step([joined(micro)], RATE)
        assert got.tokens == expected.tokens == 2 * sum(supervised)
        record_error("loss", got.loss, expected.loss, TOLERANCE)
        record_error("norm", got.grad_norm, expected.grad_norm, TOLERANCE)
        compare_all(record_error, parts.gradients, whole.gradients)
        compare_all(record_error, parts.weights(), whole.weights())


def test_router_losses_and_statistics_of_micro_batches_are_averaged(pynative):
    """And not divided by the number of supervised tokens."""
    factors = {"aux_loss_factor": 0.5, "z_loss_factor": 0.1, "capacity_factor": 0.6}
    single, double = Training(moe_config=factors), Training(2, moe_config=factors)
    batches = [batch_of(2, 15, 0), batch_of(2, 2, 1)]
    alone = [single.step([batch], 0.0) for batch in batches]
    both = double.step(batches, 0.0)
    assert both.aux_loss == pytest.approx(np.mean([r.aux_loss for r in alone]), rel=1e-6)
    assert both.z_loss == pytest.approx(np.mean([r.z_loss for r in alone]), rel=1e-6)
    assert both.loss == pytest.approx(both.lm_loss + both.aux_loss + both.z_loss)
    for field in ("expert_load", "drop_percent", "router_entropy"):
        expected = np.mean([getattr(r, field) for r in alone], axis=0)
        np.testing.assert_allclose(getattr(both, field), expected, rtol=1e-5, atol=1e-6)
    assert min(both.drop_percent) > 5


def test_clipping(pynative, record_error):
    batch = batch_of(2, 15, 0)
    free, clipped, loose = (Training(max_grad_norm=n) for n in (None, 0.05, 1e6))
    results = [training.step([batch], RATE) for training in (free, clipped, loose)]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in free.gradients.values()))
    for result in results:  # what is reported is the norm before clipping
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.05
    expected = {name: value * 0.05 / norm for name, value in free.gradients.items()}
    compare_all(record_error, clipped.gradients, expected)
    compare_all(record_error, loose.weights(), free.weights())


@pytest.mark.parametrize("loss_scale", [1024.0, 0.5])
def test_a_loss_scale_cancels_out(loss_scale, pynative, record_error):
    batch = batch_of(2, 9, 0)
    plain, scaled = Training(max_grad_norm=0.5), Training(max_grad_norm=0.5)
    expected, got = plain.step([batch], RATE), scaled.step([batch], RATE, loss_scale)
    record_error("norm", got.grad_norm, expected.grad_norm, TOLERANCE)
    assert got.loss == expected.loss
    compare_all(record_error, scaled.weights(), plain.weights())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_overflow_leaves_weights_and_moments_alone(accumulation, pynative):
    """float16 with a loss scale far too large, then with one that fits."""
    training = Training(accumulation, compute_dtype="float16")
    batches = [batch_of(2, 15, seed) for seed in range(accumulation)]
    training.step(batches, RATE, 64.0)
    weights, moments = training.weights(), training.optimizer.state_tensors()
    moments = {name: value.copy() for name, value in moments.items()}

    result = training.step(batches, RATE, 2.0**40)
    assert result.skipped
    assert training.optimizer.updates == 1
    for name, value in training.weights().items():
        np.testing.assert_array_equal(value, weights[name])
    for name, value in training.optimizer.state_tensors().items():
        np.testing.assert_array_equal(value, moments[name])
    names = {p.name for p in training.network.trainable_params()}
    assert training.step.first_non_finite_gradient() in names

    result = training.step(batches, RATE, 64.0)
    assert not result.skipped and np.isfinite(result.grad_norm)
    assert training.optimizer.updates == 2
    assert training.step.first_non_finite_gradient() is None
    changed = training.weights()
    assert any((changed[name] != weights[name]).any() for name in names)


def test_the_first_layer_that_is_not_finite_is_named(pynative):
    training = Training()
    poisoned = training.network.model.layers[1].ffn_norm.weight
    value = poisoned.asnumpy().copy()
    value[3] = np.nan
    poisoned.set_data(mindspore.Tensor(value))
    result = training.step([batch_of(2, 15, 0)], RATE)
    assert result.skipped
    # Everything before the bad weight gets its gradient through it.
    assert training.step.first_non_finite_gradient() is not None
    assert training.optimizer.updates == 0


def test_float16_trains(pynative):
    half, full = Training(compute_dtype="float16"), Training()
    batch = batch_of(2, 15, 0)
    losses = [[t.step([batch], RATE, 128.0).loss for _ in range(5)] for t in (half, full)]
    assert np.isfinite(losses[0]).all()
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def test_nothing_supervised_moves_nothing_but_the_decay(pynative):
    training = Training()
    before = training.weights()
    result = training.step([batch_of(2, 0, 0)], RATE)
    assert result.loss == 0.0 and result.grad_norm == 0.0 and not result.skipped
    for name, value in training.weights().items():
        factor = 1 - RATE * 0.1 if value.ndim > 1 else 1.0
        np.testing.assert_allclose(value, before[name] * factor, rtol=1e-5)


def test_a_wrong_number_of_micro_batches_is_refused(pynative):
    with pytest.raises(ValueError, match="3 micro batches given, 2 expected"):
        Training(accumulation=2).step([batch_of(2, 15, 0)] * 3, RATE)


def test_graph_mode_recompute_and_pynative_agree(device, record_error):
    """One layer's compilation each; jitter on, which recomputing must repeat."""
    changes = {
        "num_layers": 1,
        "moe_config": {"router_jitter": 0.2, "aux_loss_factor": 0.1, "capacity_factor": 1.0},
    }
    batches = [batch_of(2, 15, 0, padded=1), batch_of(2, 4, 1)]
    runs = {}
    before = mindspore.get_context("mode")
    try:
        for name, mode, recompute in (
            ("pynative", mindspore.PYNATIVE_MODE, False),
            ("graph", mindspore.GRAPH_MODE, False),
            ("recompute", mindspore.GRAPH_MODE, True),
        ):
            mindspore.set_context(mode=mode)
            training = Training(2, max_grad_norm=0.5, recompute=recompute, **changes)
            results = [training.step(batches, RATE) for _ in range(2)]
            runs[name] = (training, results)
    finally:
        mindspore.set_context(mode=before)
    reference, expected = runs["pynative"]
    for name in ("graph", "recompute"):
        training, results = runs[name]
        for got, wanted in zip(results, expected, strict=True):
            record_error(f"{name} loss", got.loss, wanted.loss, TOLERANCE)
            record_error(f"{name} norm", got.grad_norm, wanted.grad_norm, TOLERANCE)
        compare_all(record_error, training.gradients, reference.gradients)
        compare_all(record_error, training.weights(), reference.weights())
