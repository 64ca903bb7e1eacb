"""Adapters beside peft, and merged beside unmerged."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from helpers import hf
from helpers.lora import ATTENTION, EVERYTHING, adapted_network, adapters_of, pet, save_adapter
from helpers.tiny import random_ids, tiny_config
from mindspore import Tensor

from mixtral_ms.cli.commands.convert import main as convert_weight
from mixtral_ms.convert.adapters.lora_weights import open_adapter
from mixtral_ms.convert.adapters.peft_export import write_peft
from mixtral_ms.model.mixtral import MixtralForCausalLM

pytestmark = pytest.mark.usefixtures("pynative")

PEFT_TOLERANCE, MERGED_TOLERANCE = 1e-4, 1e-5
TARGETS = {
    "attention": ATTENTION,
    "experts": ".*w[123]",
    "everything": EVERYTHING,
    "w1 alone": ".*w1",
    "w3 and the router": r".*w3|.*router\.dense",
    "w2 of one layer, wq of the other": r"model\.layers\.0\..*w2|model\.layers\.1\..*wq",
}


def pair(section, seed=0):
    """transformers' model and our network with the same weights and random adapters."""
    config = tiny_config(theta=1e4)
    theirs, ours = hf.reference_model(config, seed), adapted_network(config, section, seed)
    weights = hf.to_our_names({n: p.detach().numpy() for n, p in theirs.named_parameters()}, config)
    parameters = {p.name: p for p in ours.weights()}
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(np.ascontiguousarray(weights[name])))
    ours.set_train(False)
    return config, theirs, ours


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_reads_the_adapter(tmp_path, targets, record_error):
    section = pet(targets)
    config, theirs, ours = pair(section)
    ids = random_ids(config)
    plain = logits_of(theirs, ids)
    write_peft(tmp_path, adapters_of(ours), section, "the base")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(loaded)
    assert held.keys() == stored.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(value.numpy(), stored[name])
    got = ours(Tensor(ids)).asnumpy()
    assert np.abs(got - plain).max() > 0.1  # the adapters do something
    record_error("logits", got, logits_of(loaded, ids), PEFT_TOLERANCE)


def test_peft_is_told_what_was_trained(tmp_path):
    section = pet(ATTENTION, rank=4, alpha=8.0, dropout=0.1)
    _, _, ours = pair(section)
    write_peft(tmp_path, adapters_of(ours), section, "weights/here")
    told = peft.PeftConfig.from_pretrained(tmp_path)
    assert (told.r, told.lora_alpha, told.lora_dropout) == (4, 8.0, 0.1)
    assert told.base_model_name_or_path == "weights/here"
    assert told.target_modules == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"
    }
    assert told.target_parameters is None


@pytest.mark.parametrize("to", ["hf", "ours", "gmm"])
def test_merged_weights_compute_the_same(tmp_path, to, record_error):
    config, theirs, ours = pair(pet(EVERYTHING))
    theirs.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    save_adapter(tmp_path / "run", ours)
    arguments = ["--input_path", tmp_path / "base", "--merge_lora", tmp_path / "run", "--to", to]
    assert convert_weight([*map(str, arguments), "--output_path", str(tmp_path / "merged")]) == 0
    ids = random_ids(config)
    if to == "hf":
        opened = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", dtype="auto", attn_implementation="eager"
        )
        merged = logits_of(opened, ids)
    else:
        network = MixtralForCausalLM(config)
        tensors = safetensors.numpy.load_file(tmp_path / "merged" / "rank_0" / "model.safetensors")
        for parameter in network.trainable_params():
            value = tensors[parameter.name]
            swap = to == "gmm" and value.ndim == 3
            parameter.set_data(
                Tensor(np.ascontiguousarray(value.swapaxes(1, 2) if swap else value))
            )
        network.set_train(False)
        merged = network(Tensor(ids)).asnumpy()
    record_error("logits", merged, ours(Tensor(ids)).asnumpy(), MERGED_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path, dtype):
    section = pet(".*wq|.*w1")
    config, theirs, ours = pair(section)
    theirs.to(dtype).save_pretrained(tmp_path / "base")
    rounded = hf.to_our_names(
        {n: p.detach().float().numpy() for n, p in theirs.named_parameters()}, config
    )
    for parameter in ours.weights():
        parameter.set_data(Tensor(np.ascontiguousarray(rounded[parameter.name])))
    save_adapter(tmp_path / "run", ours)
    output = tmp_path / "merged"
    arguments = ["--input_path", tmp_path / "base", "--merge_lora", tmp_path / "run"]
    assert convert_weight([*map(str, arguments), "--output_path", str(output)]) == 0
    import safetensors.torch  # noqa: PLC0415

    merged = safetensors.torch.load_file(output / "rank_0" / "model.safetensors")
    adapters = adapters_of(ours)
    for name, value in merged.items():
        assert value.dtype == dtype
        module, expected = name.removesuffix(".weight"), rounded[name]
        if f"{module}.lora_a" in adapters:
            low, high = adapters[f"{module}.lora_a"], adapters[f"{module}.lora_b"]
            expected = expected + np.float32(section.scale) * (high @ low)
        np.testing.assert_array_equal(
            value.float().numpy(), torch.from_numpy(np.array(expected)).to(dtype).float().numpy()
        )
    assert json.loads((output / "state.json").read_text())["merged_lora"].startswith(
        str(tmp_path / "run")
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_saved_is_read(tmp_path, rslora, record_error):
    config, theirs, _ = pair(pet(ATTENTION))
    told = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora
    )
    adapted = peft.get_peft_model(theirs, told)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path, config)
    _, _, ours = pair(adapter.pet)
    for parameter in ours.trainable_params():
        parameter.set_data(Tensor(np.array(adapter.tensors.read(parameter.name))))
    ids = random_ids(config)
    got = ours(Tensor(ids)).asnumpy()
    record_error("logits", got, logits_of(adapted, ids), PEFT_TOLERANCE)
