"""LoRA: what is adapted, gradients, dropout, and adapters on disk."""

import dataclasses
import json
import math

import numpy as np
import pytest
import safetensors.numpy
from helpers.lora import ATTENTION, EVERYTHING, adapted_network, adapters_of, pet, save_adapter
from helpers.tiny import random_ids, shifted, tiny_config
from mindspore import Tensor

from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo
from mixtral_ms.config.derived.parameter_table import adapted_rows
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.convert.adapters import lora_weights as lora
from mixtral_ms.convert.adapters.peft_export import write_peft
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.kernels.cells.experts import PackedExperts
from mixtral_ms.kernels.cells.lora_experts import LowRankExperts, MergedExperts
from mixtral_ms.model.lora import set_dropout_keys
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes, placements
from mixtral_ms.train.objectives.causal_lm import CausalLMLoss
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("pynative")
ROUTER = "feed_forward.routed_experts.router.dense"


def modules_of(pattern):
    return [row.module.format(layer=layer) for layer, row in adapted_rows(pet(pattern), 2)]


def batch_of(config):
    ids = random_ids(config)
    return Batch(ids, shifted(ids), None)


class Gradients:
    """Stands for an optimizer and keeps what it is given."""

    shards = ()

    def __init__(self, network):
        self.kernels = AdamW(network.trainable_params()).kernels

    def update(self, gradients, *_):
        self.last = [np.array(one.asnumpy()) for one in gradients]


def step_gradients(network, batch):
    keeper = Gradients(network)
    loss = TrainStep(network, keeper)([batch], 0.0).loss
    return loss, keeper.last


def loss_of(network, batch):
    network.set_train()
    loss = CausalLMLoss(network)(Tensor(batch.input_ids), Tensor(batch.labels))[0]
    return float(loss.asnumpy())


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (ATTENTION, {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}),
        (".*w1", {"feed_forward.routed_experts.ffn.w1"}),
        (r".*router\.dense", {ROUTER}),
        (r".*attention\.w[qv]", {"attention.wq", "attention.wv"}),
    ],
)
def test_the_pattern_means_whole_names(pattern, kinds):
    modules = modules_of(pattern)
    assert modules and {module.split(".", 3)[3] for module in modules} == kinds
    assert {int(module.split(".")[2]) for module in modules} == {0, 1}


@pytest.mark.parametrize("pattern", [".*", ".*dense", ".*dense|.*w1"])
def test_the_router_is_not_adapted_by_chance(pattern):
    assert not any(module.endswith(ROUTER) for module in modules_of(pattern))


def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws_it():
    config = tiny_config()
    plain = MixtralForCausalLM(config)
    fresh = MixtralForCausalLM(dataclasses.replace(config, pet_config=pet(EVERYTHING, rank=4)))
    ids = Tensor(random_ids(config))
    plain.set_train(False)
    fresh.set_train(False)
    np.testing.assert_allclose(fresh(ids).asnumpy(), plain(ids).asnumpy(), rtol=0, atol=1e-5)
    for name, value in adapters_of(fresh).items():
        if name.endswith(".lora_b"):
            assert not value.any()
            continue
        bound = math.sqrt(6 / ((1 + 5) * value.shape[-1]))  # kaiming uniform, a = sqrt(5)
        assert 0.8 * bound < np.abs(value).max() <= bound
        assert abs(value.std() - bound / math.sqrt(3)) < 0.15 * bound


def test_only_adapters_are_trained_and_have_moments():
    network = adapted_network(tiny_config(), pet(EVERYTHING))
    before = {p.name: p.asnumpy().copy() for p in network.weights()}
    trained = {p.name for p in network.trainable_params()}
    assert trained == adapter_shapes(network.config).keys()
    optimizer = AdamW(network.trainable_params())
    assert len(optimizer.state_tensors()) == 2 * len(trained)
    adapters = adapters_of(network)
    TrainStep(network, optimizer)([batch_of(network.config)], 1e-2)
    for parameter in network.weights():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])
    after = adapters_of(network)
    assert [name for name in trained if (after[name] == adapters[name]).all()] == []


def test_gradients_are_those_of_the_sum_of_weights():
    """Against full training of W + scale * B A: dA = scale B^T dW and dB = scale dW A^T."""
    config, section = tiny_config(), pet(EVERYTHING)
    network, batch = adapted_network(config, section), batch_of(config)
    loss, found = step_gradients(network, batch)
    adapters, full = adapters_of(network), MixtralForCausalLM(config)
    weights = {p.name: p.asnumpy() for p in network.weights()}
    for parameter in full.trainable_params():
        module, value = parameter.name.removesuffix(".weight"), weights[parameter.name]
        if f"{module}.lora_a" in adapters:
            delta = adapters[f"{module}.lora_b"] @ adapters[f"{module}.lora_a"]
            value = value + np.float32(section.scale) * delta
        parameter.set_data(Tensor(value))
    full_loss, of_weights = step_gradients(full, batch)
    assert loss == pytest.approx(full_loss, rel=1e-6)
    by_name = dict(zip((p.name for p in full.trainable_params()), of_weights, strict=True))
    for parameter, gradient in zip(network.trainable_params(), found, strict=True):
        module, _, which = parameter.name.rpartition(".")
        d_weight = by_name[f"{module}.weight"]
        if which == "lora_a":
            expected = section.scale * np.swapaxes(adapters[f"{module}.lora_b"], -1, -2) @ d_weight
        else:
            expected = section.scale * d_weight @ np.swapaxes(adapters[f"{module}.lora_a"], -1, -2)
        error = np.abs(gradient - expected).max()
        assert error <= 1e-4 * np.abs(expected).max(), parameter.name


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("w3",), ()])
def test_both_kinds_of_experts_are_the_same(names):
    generator = np.random.default_rng(0)

    def random(*shape):
        return Tensor(generator.normal(0, 0.3, shape).astype(np.float32))

    def pair(name, outputs, inputs):
        if name in names:
            return random(3, 2, inputs), random(3, outputs, 2)
        return (Tensor(np.zeros(1, np.float32)),) * 2

    inputs = (random(9, 8), random(3, 12, 8), random(3, 12, 8), random(3, 8, 12))
    sizes = Tensor(np.array([4, 0, 3], np.int32))
    adapters = (*pair("w1", 12, 8), *pair("w3", 12, 8), *pair("w2", 8, 12))
    adapted = tuple(name in names for name in ("w1", "w3", "w2"))
    merged = MergedExperts(PackedExperts(), 1.5, adapted)(*inputs, sizes, *adapters)
    low_rank = LowRankExperts(1.5, 0.0, 0)(*inputs, sizes, *adapters)
    assert not low_rank.asnumpy()[7:].any()
    np.testing.assert_allclose(low_rank.asnumpy(), merged.asnumpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [ATTENTION, ".*w[123]"])
@pytest.mark.slow
def test_dropout_is_a_function_of_the_key(targets):
    config = tiny_config()
    network, batch = adapted_network(config, pet(targets, dropout=0.5)), batch_of(config)
    losses = []
    for key in (7, 8, 7):
        set_dropout_keys(network, key)
        losses.append(loss_of(network, batch))
    assert losses[0] == losses[2] != losses[1]
    still = adapted_network(config, pet(targets))
    network.set_train(False)
    still.set_train(False)
    ids = Tensor(batch.input_ids)
    np.testing.assert_array_equal(network(ids).asnumpy(), still(ids).asnumpy())


@pytest.mark.slow
def test_dropout_keeps_the_mean():
    """Over many keys the adapter's part is that without dropout; its gradient is finite."""
    config = tiny_config(num_layers=1)
    network = adapted_network(config, pet(".*wo|.*w2", dropout=0.3))
    still, batch = adapted_network(config, pet(".*wo|.*w2")), batch_of(config)
    network.set_train()
    ids, outputs = Tensor(batch.input_ids), []
    for key in range(60):
        set_dropout_keys(network, key)
        outputs.append(network(ids).asnumpy())
    outputs = np.stack(outputs)
    wanted = still.set_train(False)(ids).asnumpy()
    spread = outputs.std(0).mean()
    assert spread > 0.01
    assert np.abs(outputs.mean(0) - wanted).mean() < spread / 2


def test_where_adapters_lie_on_ranks():
    config = tiny_config(pet_config=pet(EVERYTHING, rank=2), hidden_size=24)
    shapes = adapter_shapes(config)
    grid = ParallelConfig(data_parallel=2, model_parallel=2, expert_parallel=2)
    found = placements(config, grid, [*shapes, *(f"adam_m.{name}" for name in shapes)], zero=False)
    prefix = "model.layers.0."
    local = {
        name: found[prefix + name][0].local_shape(shapes[prefix + name])
        for name in (
            "attention.wq.lora_a",
            "attention.wq.lora_b",
            "attention.wo.lora_a",
            "attention.wo.lora_b",
            "feed_forward.routed_experts.ffn.w1.lora_a",
            "feed_forward.routed_experts.ffn.w1.lora_b",
            "feed_forward.routed_experts.ffn.w2.lora_a",
            "feed_forward.routed_experts.ffn.w2.lora_b",
        )
    }
    assert list(local.values()) == [
        (2, 24),
        (16, 2),
        (2, 16),
        (24, 2),
        (2, 2, 24),
        (2, 20, 2),
        (2, 2, 20),
        (2, 24, 2),
    ]


def test_parts_of_adapted_weights_are_parts_of_the_whole(tmp_path):
    network = adapted_network(tiny_config(), pet(EVERYTHING))
    save_adapter(tmp_path, network)
    weights = lora.adapted(NetworkSource(network), tmp_path, network.config)
    for name in (
        "model.layers.1.attention.wk.weight",
        "model.layers.0.feed_forward.routed_experts.ffn.w2.weight",
    ):
        whole = weights.read(name)
        region = tuple(slice(size // 3, size) for size in whole.shape)
        np.testing.assert_allclose(weights.read(name, region), whole[region], rtol=1e-5, atol=1e-6)
        assert np.abs(whole - NetworkSource(network).read(name)).max() > 0.1


class NetworkSource(lora.TensorSource):
    """A network's weights as if they were on disk."""

    def __init__(self, network):
        self.path = "memory"
        self._arrays = {p.name: p.asnumpy() for p in network.weights()}
        self.infos = {n: TensorInfo(a.shape, "float32") for n, a in self._arrays.items()}

    def read(self, name, region=None):
        return self._arrays[name][region or ...]


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    network = adapted_network(tiny_config(), pet())
    save_adapter(tmp_path, network, base="weights/one")
    other = NetworkSource(MixtralForCausalLM(tiny_config(), seed=1))
    with pytest.raises(UserError, match="made for the weights of weights/one .* memory"):
        lora.adapted(other, tmp_path, network.config)


def test_an_adapter_of_another_network_is_refused(tmp_path):
    save_adapter(tmp_path, adapted_network(tiny_config(), pet()))
    with pytest.raises(UserError, match=r"(?s)does not fit .*wk.lora_b: .16, 3. in"):
        lora.open_adapter(tmp_path, tiny_config(n_kv_heads=4))


@pytest.mark.parametrize("place", ["nowhere", "peft"])
def test_what_is_no_adapter_is_refused(tmp_path, place):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not exist|lacks 'r'"):
        lora.open_adapter(tmp_path / place, tiny_config())


def written_for_peft(folder, **change):
    """An adapter of ours in PEFT's format, with other keys of its configuration."""
    network = adapted_network(tiny_config(), pet(alpha=7.0))
    write_peft(folder, adapters_of(network), network.config.pet_config, "the/base")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return network


def test_what_was_written_for_peft_is_read_again(tmp_path):
    network = written_for_peft(tmp_path)
    adapter = lora.open_adapter(tmp_path, tiny_config())
    assert (adapter.pet.lora_rank, adapter.pet.scale) == (3, 7.0 / 3)
    for name, values in adapters_of(network).items():
        np.testing.assert_array_equal(adapter.tensors.read(name), values)
    assert adapter.tensors.infos.keys() == adapters_of(network).keys()


def test_a_scale_by_the_root_of_the_rank(tmp_path):
    written_for_peft(tmp_path, use_rslora=True)
    assert lora.open_adapter(tmp_path, tiny_config()).pet.scale == pytest.approx(7.0 / 3**0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"r": "8"}, "'r'"),
        ({"lora_alpha": None}, "'lora_alpha'"),
        ({"r": 4}, "does not fit"),
    ],
)
def test_what_peft_has_and_we_have_not_is_named(tmp_path, change, said):
    written_for_peft(tmp_path, **change)
    with pytest.raises(UserError) as caught:
        lora.open_adapter(tmp_path, tiny_config())
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def test_what_peft_adapts_elsewhere_is_named(tmp_path):
    written_for_peft(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 4), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapts base_model.model.lm_head.lora_A.weight"):
        lora.open_adapter(tmp_path, tiny_config())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks adapter_model.safetensors"):
        lora.open_adapter(tmp_path, tiny_config())
