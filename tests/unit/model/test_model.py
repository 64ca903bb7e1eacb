"""The network's promises: names, losses, independence of padding, batch and packing."""

import logging

import mindspore
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.tiny import random_ids, shifted, tiny_config
from mindspore import Tensor

from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.model.nn import compute_dtype as dtypes
from mixtral_ms.model.nn.linear import Linear
from mixtral_ms.train.objectives.causal_lm import CausalLMLoss

pytestmark = pytest.mark.usefixtures("pynative")

TOLERANCE = 1e-5


def logits_of(network, ids, **more):
    return network(Tensor(ids), **{n: Tensor(v) for n, v in more.items()}).asnumpy()


def with_weights_of(source, **sizes):
    """The same weights in a network of other shapes."""
    network = MixtralForCausalLM(source.config, **sizes)
    for own, other in zip(network.get_parameters(), source.get_parameters(), strict=True):
        own.set_data(Tensor(other.asnumpy()))
    return network


@pytest.fixture
def network(pynative):
    return MixtralForCausalLM(tiny_config(), seed=1)


# parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_parameter_names_and_shapes(tied, biases):
    config = tiny_config(
        tie_word_embeddings=tied, qkv_has_bias=biases, attn_proj_has_bias=biases, num_layers=1
    )
    layer = "model.layers.0."
    expected = {
        "model.tok_embeddings.embedding_weight": (61, 24),
        layer + "attention_norm.weight": (24,),
        layer + "attention.wq.weight": (32, 24),
        layer + "attention.wk.weight": (16, 24),
        layer + "attention.wv.weight": (16, 24),
        layer + "attention.wo.weight": (24, 32),
        layer + "ffn_norm.weight": (24,),
        layer + "feed_forward.routed_experts.router.dense.weight": (4, 24),
        layer + "feed_forward.routed_experts.ffn.w1.weight": (4, 40, 24),
        layer + "feed_forward.routed_experts.ffn.w2.weight": (4, 24, 40),
        layer + "feed_forward.routed_experts.ffn.w3.weight": (4, 40, 24),
        "model.norm_out.weight": (24,),
    }
    if not tied:
        expected["lm_head.weight"] = (61, 24)
    if biases:
        for name, size in (("wq", 32), ("wk", 16), ("wv", 16), ("wo", 24)):
            expected[f"{layer}attention.{name}.bias"] = (size,)
    network = MixtralForCausalLM(config)
    assert {p.name: p.shape for p in network.trainable_params()} == expected


def test_initial_weights_depend_on_the_seed_and_the_name_alone():
    def weights(seed, layers=2):
        network = MixtralForCausalLM(tiny_config(num_layers=layers), seed=seed)
        return {p.name: p.asnumpy() for p in network.get_parameters()}

    first, again, other, deeper = weights(1), weights(1), weights(2), weights(1, layers=3)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        np.testing.assert_array_equal(value, deeper[name])
        if "norm" in name:
            assert (value == 1).all()
        else:
            assert np.abs(value - other[name]).max() > 0.1
            assert 0.15 < value.std() < 0.25
    q = [first[f"model.layers.{i}.attention.wq.weight"] for i in range(2)]
    assert not np.allclose(*q)


def test_linear_with_bias():
    generator = np.random.default_rng(0)
    x, weight, bias = (
        generator.standard_normal(s).astype(np.float32) for s in ((2, 3, 5), (7, 5), 7)
    )
    linear = Linear(5, 7, bias=True)
    linear.weight.set_data(Tensor(weight))
    linear.bias.set_data(Tensor(bias))
    assert_close(linear(Tensor(x)).asnumpy(), x @ weight.T + bias, TOLERANCE)


# losses


def test_logits_are_float32_of_the_batch_shape(network):
    logits = logits_of(network, random_ids(network.config))
    assert logits.dtype == np.float32
    assert logits.shape == (2, 16, 61)


def test_loss_is_the_mean_over_supervised_tokens_plus_router_losses():
    config = tiny_config(moe_config={"aux_loss_factor": 0.1, "z_loss_factor": 0.01})
    network = MixtralForCausalLM(config)
    ids = random_ids(config)
    labels = shifted(ids)
    labels[0, :9] = -100
    loss, lm_sum, aux_L, z_L, *_ = (
        v.asnumpy() for v in CausalLMLoss(network)(Tensor(ids), Tensor(labels))
    )
    logits = logits_of(network, ids).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, np.maximum(labels, 0)[..., None], -1)[..., 0]
    expected = -picked[labels != -100].sum()
    assert (labels != -100).sum() == 21
    assert_close(lm_sum, expected, TOLERANCE)
    assert aux_L.shape == z_L.shape == (2,)
    assert_close(loss, expected / 21 + aux_L.sum() + z_L.sum(), TOLERANCE)


def test_nothing_supervised_gives_zero_not_nan(network):
    ids = random_ids(network.config)
    loss = CausalLMLoss(network)(Tensor(ids), Tensor(np.full_like(ids, -100)))[0]
    assert float(loss) == 0.0


def test_ignore_token_id_is_configurable():
    config = tiny_config(ignore_token_id=7)
    network = MixtralForCausalLM(config)
    labels = np.full((2, 16), 7, np.int32)
    labels[0, :3] = 5
    loss, lm_sum, *_ = CausalLMLoss(network)(Tensor(random_ids(config)), Tensor(labels))
    assert_close(loss.asnumpy(), lm_sum.asnumpy() / 3, TOLERANCE)


def test_aux_loss_of_each_layer_shows_a_collapse():
    """Two layers that collapse onto different experts look even when taken together:
    transformers issues 28255 and 31464."""
    config = tiny_config(
        moe_config={"expert_num": 2, "num_experts_chosen": 1, "aux_loss_factor": 1.0}
    )
    network = MixtralForCausalLM(config)
    embedding = network.model.tok_embeddings.embedding_weight
    value = embedding.asnumpy().copy()
    value[:, 0] = 20.0  # one coordinate that is large and positive for every token
    embedding.set_data(Tensor(value))
    for i, layer in enumerate(network.model.layers):
        gate = np.zeros((2, 24), np.float32)
        gate[i, 0] = 5.0
        layer.feed_forward.routed_experts.router.dense.weight.set_data(Tensor(gate))
    ids = random_ids(config)
    _, aux_L, _, load_LE, dropped_L, entropy_L = (v.asnumpy() for v in network.model(Tensor(ids)))
    np.testing.assert_allclose(load_LE, [[1, 0], [0, 1]])
    np.testing.assert_allclose(aux_L, [2.0, 2.0], rtol=1e-3)  # E, its largest value; even is 1
    np.testing.assert_allclose(dropped_L, 0, atol=1e-6)
    assert (entropy_L < 0.01).all()


# independence


def test_no_position_sees_what_follows(network):
    ids = random_ids(network.config)
    changed = ids.copy()
    changed[:, 9:] = random_ids(network.config, seed=5)[:, 9:]
    before, after = logits_of(network, ids), logits_of(network, changed)
    assert_close(after[:, :9], before[:, :9], TOLERANCE)
    assert np.abs(after[:, 9:] - before[:, 9:]).max() > 0.1


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_rows_do_not_depend_on_their_batch(backend):
    """mistral-inference issue 150; dropless."""
    config = tiny_config()
    network = MixtralForCausalLM(config, seed=1, backend=backend)
    single = with_weights_of(network, batch_size=1, backend=backend)
    ids = random_ids(config)
    together = logits_of(network, ids)
    for row in range(2):
        assert_close(logits_of(single, ids[row : row + 1])[0], together[row], TOLERANCE)


def test_right_padding_changes_nothing(network):
    ids = random_ids(network.config)
    ids[:, 10:] = 0
    short = with_weights_of(network, seq_length=10)
    assert_close(logits_of(network, ids)[:, :10], logits_of(short, ids[:, :10]), TOLERANCE)
    labels = shifted(ids)
    labels[:, 9:] = -100
    padded = CausalLMLoss(network)(Tensor(ids), Tensor(labels))
    alone = CausalLMLoss(short)(Tensor(ids[:, :10]), Tensor(labels[:, :10]))
    for got, expected in zip(padded, alone, strict=True):  # statistics of the router too
        np.testing.assert_allclose(got.asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-6)


def test_padding_takes_no_capacity():
    """Left of the real tokens, and yet the slots are theirs."""
    config = tiny_config(
        batch_size=1, num_layers=1, moe_config={"capacity_factor": 1.0, "enable_sdrop": True}
    )
    network = MixtralForCausalLM(config)
    ids = random_ids(config)
    ids[:, :12] = 0
    dropped_L = network.model(Tensor(ids))[4].asnumpy()
    # capacity is 2 * 16 / 4 = 8 slots and the 4 real tokens need at most 4
    np.testing.assert_allclose(dropped_L, 0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_sequences_equal_separate_ones(window, record_error):
    config = tiny_config(batch_size=1, sliding_window=window)
    network = MixtralForCausalLM(config, seed=1)
    ids = random_ids(config)
    lengths = (5, 8, 3)
    segments = np.repeat(np.arange(3), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    packed = logits_of(network, ids, segment_ids_BS=segments, positions_BS=positions)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = logits_of(with_weights_of(network, seq_length=length), ids[:, part])
        record_error(f"{length} tokens", packed[:, part], alone, TOLERANCE)
        begin += length
    assert np.abs(packed - logits_of(network, ids)).max() > 0.1


# numbers


def test_bfloat16_falls_back_on_the_cpu_with_one_line(device):
    if device != "CPU":
        pytest.skip("the fallback is the CPU's")
    lines = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    listener = Listener()
    get_logger().addHandler(listener)
    dtypes._say_fallback.cache_clear()
    try:
        config = tiny_config(compute_dtype="bfloat16")
        ids = random_ids(config)
        got = [logits_of(MixtralForCausalLM(config, seed=1), ids) for _ in range(2)]
    finally:
        get_logger().removeHandler(listener)
    assert len([line for line in lines if "bfloat16" in line]) == 1
    expected = logits_of(MixtralForCausalLM(tiny_config(), seed=1), ids)
    for logits in got:
        np.testing.assert_array_equal(logits, expected)


def test_an_unknown_dtype_is_named():
    with pytest.raises(UserError, match="'fp8'.*float32, float16, bfloat16"):
        dtypes.compute_type("fp8")


def test_float16_is_near_float32():
    ids = random_ids(tiny_config())
    half = logits_of(MixtralForCausalLM(tiny_config(compute_dtype="float16"), seed=1), ids)
    full = logits_of(MixtralForCausalLM(tiny_config(), seed=1), ids)
    assert half.dtype == np.float32
    # A choice that two logits tie for may differ: the typical value, not the largest.
    assert 0 < np.median(np.abs(half - full)) < 1e-2 * np.abs(full).max()


@pytest.mark.parametrize("key", ["residual_dtype", "rotary_dtype"])
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_a_narrow_part_of_a_float32_network(key, backend):
    """Kernels of float32 must not read a float16 tensor's bytes."""
    config = tiny_config(**{key: "float16"})
    ids = random_ids(config)
    mixed = logits_of(MixtralForCausalLM(config, seed=1, backend=backend), ids)
    full = logits_of(MixtralForCausalLM(tiny_config(), seed=1), ids)
    assert 0 < np.median(np.abs(mixed - full)) < 1e-2 * np.abs(full).max()


def test_jitter_acts_in_training_only():
    config = tiny_config(moe_config={"router_jitter": 0.3})
    network = MixtralForCausalLM(config, seed=1)
    plain = MixtralForCausalLM(tiny_config(), seed=1)
    ids = random_ids(config)
    expected = logits_of(plain, ids)
    network.set_train()
    first = logits_of(network, ids)
    np.testing.assert_array_equal(first, logits_of(network, ids))
    assert np.abs(first - expected).max() > 1e-3
    keys = [p for p in network.get_parameters() if p.name.endswith("jitter_key")]
    assert len(keys) == 2
    for key in keys:
        key.set_data(Tensor(1.0, mindspore.float32))
    assert np.abs(logits_of(network, ids) - first).max() > 1e-3
    network.set_train(False)
    np.testing.assert_array_equal(logits_of(network, ids), expected)


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_uniform_routing_spreads_the_load(backend):
    config = tiny_config(moe_config={"uniform_routing": True})
    network = MixtralForCausalLM(config, backend=backend)
    ids = random_ids(config)
    load_LE = network.model(Tensor(ids))[3].asnumpy()
    np.testing.assert_allclose(load_LE, 0.25)
