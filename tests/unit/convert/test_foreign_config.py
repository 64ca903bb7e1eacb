"""config.json as transformers reads it: what is taken, what is refused, and nothing lost."""

import dataclasses
import json

import pytest
from helpers import convert_oracle as oracle

from mixtral_ms.checkpoint.store.conversion_record import FORMAT_KEY
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.formats.foreign_config import read_config
from mixtral_ms.convert.formats.write_config import to_huggingface
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError

BASE = oracle.config_json(3) | {"bos_token_id": 1, "eos_token_id": 2}
GONE = object()

# Keys of config.json (GONE: absent) -> our keys as they are then.
READ = {
    "theta in the section of transformers 5": (
        {"rope_theta": GONE, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"theta": 5e5},
    ),
    "theta in rope_scaling": (
        {"rope_theta": GONE, "rope_scaling": {"type": "default", "rope_theta": 5e5}},
        {"theta": 5e5},
    ),
    "theta twice, the same": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"theta": 1e4},
    ),
    "theta null above": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
        {"theta": 5e5},
    ),
    "empty sections": ({"rope_parameters": {}, "rope_scaling": None, "moe": None}, {}),
    "no heads of their own for keys": (
        {"num_key_value_heads": None},
        {"n_kv_heads": oracle.HEADS},
    ),
    "several ends": ({"eos_token_id": [2, 7]}, {"eos_token_id": [2, 7], "eos_token_ids": [2, 7]}),
    "no end": ({"eos_token_id": None}, {"eos_token_id": -1, "eos_token_ids": [], "eos_id": None}),
    "no begin": ({"bos_token_id": None}, {"bos_token_id": -1}),
    "ends as transformers takes them": ({"eos_token_id": GONE}, {"eos_token_id": 2}),
    "padding": ({"pad_token_id": None}, {"pad_token_id": -1}),
    "padding as transformers takes it": ({"pad_token_id": GONE}, {"pad_token_id": -1}),
    "the longest position as transformers takes it": (
        {"max_position_embeddings": GONE},
        {"max_position_embedding": 131072, "seq_length": 4096},
    ),
    "the router's coefficients": (
        {"router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1, "initializer_range": 0.01},
        {"aux_loss_factor": 0.02, "router_jitter": 0.1, "init_method_std": 0.01},
    ),
    "the router's coefficients as transformers takes them": (
        {"router_aux_loss_coef": GONE},
        {"aux_loss_factor": 0.001, "router_jitter": 0.0},
    ),
    "another name of silu": ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
    "a byte order mark": ({}, {"theta": 1e6}),
}

# Keys of config.json -> parts of the error.
REFUSED = {
    "theta twice": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        ("rope_theta is 10000.0", "rope_parameters.rope_theta is 1000000.0"),
    ),
    "theta twice, in rope_scaling": (
        {"rope_theta": 1e6, "rope_scaling": {"rope_theta": 1e4}},
        ("rope_theta is 1000000.0", "rope_scaling.rope_theta is 10000.0"),
    ),
    "two numbers of experts": (
        {"num_local_experts": 3, "num_experts": 4},
        ("num_local_experts is 3", "num_experts is 4"),
    ),
    "two top-k": ({"moe": {"num_experts_per_tok": 1}}, ("moe.num_experts_per_tok is 1",)),
    "a rotary embedding for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        ("rope_parameters.full_attention",),
    ),
    "a list for a section": ({"rope_parameters": [1]}, ("rope_parameters", "an object")),
    "a text for a section": ({"rope_scaling": "linear"}, ("rope_scaling", "an object")),
    "a text for the experts": ({"moe": "x"}, ("moe", "an object")),
    "a list for the experts": ({"moe": [1]}, ("moe", "an object")),
    "a scaled rotary embedding": ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling.type",)),
    "half a rotary embedding": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5",)),
    "gates that are not normalised": ({"norm_topk_prob": False}, ("norm_topk_prob is False",)),
    "shared experts": ({"n_shared_experts": 2}, ("n_shared_experts is 2",)),
    "theta NaN": ({"rope_theta": float("nan")}, ("rope_theta is NaN",)),
    "theta infinite": ({"rope_theta": float("inf")}, ("rope_theta is NaN, infinite",)),
    "theta tiny": ({"rope_theta": 1e-300}, ("rope_theta is 1e-300", "at least 1")),
    "theta negative": ({"rope_theta": -1e6}, ("rope_theta is -1000000.0", "at least 1")),
    "theta NaN in the section": (
        {"rope_theta": GONE, "rope_parameters": {"rope_theta": float("nan")}},
        ("rope_parameters.rope_theta is NaN",),
    ),
    "eps infinite": ({"rms_norm_eps": float("inf")}, ("rms_norm_eps is NaN, infinite",)),
    "eps huge": ({"rms_norm_eps": 1e300}, ("rms_norm_eps is 1e+300", "less than 1")),
    "eps zero": ({"rms_norm_eps": 0}, ("rms_norm_eps is 0.0", "more than 0")),
    "more experts a token than there are": (
        {"num_experts_per_tok": 9},
        ("num_experts_per_tok 9", "num_local_experts 3"),
    ),
    "no expert a token": ({"num_experts_per_tok": 0}, ("num_experts_per_tok is 0", "at least 1")),
    "a width of heads of 0": ({"head_dim": 0}, ("head_dim 0", "at least 2")),
    "a window of 0": ({"sliding_window": 0}, ("sliding_window is 0", "at least 1")),
    "a vocabulary of -1": ({"vocab_size": -1}, ("vocab_size is -1", "at least 1")),
    "an end outside the vocabulary": ({"eos_token_id": 20}, ("eos_token_id 20", "19")),
    "an end outside the vocabulary, in a list": ({"eos_token_id": [2, 99]}, ("eos_token_id 99",)),
    "a begin below 0": ({"bos_token_id": -7}, ("bos_token_id -7",)),
    "padding beyond all": ({"pad_token_id": 10**18}, ("pad_token_id 1000000000000000000",)),
    "a text for the ends": ({"eos_token_id": "2"}, ("eos_token_id is '2'",)),
    "texts for the ends": ({"eos_token_id": [2, "3"]}, ("eos_token_id is '3'",)),
    "true for a number": ({"num_hidden_layers": True}, ("num_hidden_layers is True",)),
    "more layers than can be gone through": (
        {"num_hidden_layers": 2**63},
        ("num_hidden_layers is 9223372036854775808", "at most 10000"),
    ),
    "more experts than can be gone through": (
        {"num_local_experts": 10**12},
        ("num_local_experts is 1000000000000", "at most 10000"),
    ),
    "a fraction for a number": ({"hidden_size": 12.0}, ("hidden_size is 12.0", "whole")),
    "keys and values that no head fits": (
        {"num_key_value_heads": 3},
        ("num_attention_heads 4", "num_key_value_heads 3"),
    ),
    "a jitter beyond 1": ({"router_jitter_noise": 1.5}, ("router_jitter_noise is 1.5",)),
}


def write(folder, change, generation=None, bom=False):
    data = {key: value for key, value in (BASE | change).items() if value is not GONE}
    text = ("\ufeff" if bom else "") + json.dumps(data)
    (folder / "config.json").write_text(text, encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder / "config.json"


@pytest.mark.parametrize("case", READ)
def test_read_as_transformers_does(case, tmp_path):
    change, expected = READ[case]
    network = read_config(write(tmp_path, change, bom="mark" in case)).config
    values = {name: getattr(network, name, None) for name in dir(network)}
    values |= dataclasses.asdict(network.moe_config)
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_or_cannot_be_is_refused(case, tmp_path):
    change, parts = REFUSED[case]
    path = write(tmp_path, change)
    with pytest.raises(UserError) as caught:
        read_config(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"rope_theta": 1e6, "rope_theta": 1e4}', "twice"),
        ("[" * 100_000, "nested"),
        ('{"a": "\\ud83d"}', "surrogate"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "digits"),
        ('{"rms_norm_eps": 1e999}', "beyond"),
        ("[1]", "not an object"),
        ("", "empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        ("<!DOCTYPE html><html>", "web page"),
    ],
)
def test_what_is_no_configuration_is_named(text, part, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and part in str(caught.value)


@pytest.mark.parametrize(
    "config, generation, ids",
    [
        (2, {"eos_token_id": [2, 7]}, [2, 7]),
        (2, {"eos_token_id": 7}, [2, 7]),
        ([2, 3], {"eos_token_id": [7, 2]}, [2, 3, 7]),
        (None, {"eos_token_id": 7}, [7]),
        (2, {"eos_token_id": None}, [2]),
        (2, {}, [2]),
    ],
)
def test_the_ends_of_both_files_are_united(config, generation, ids, tmp_path):
    path = write(tmp_path, {"eos_token_id": config}, generation)
    assert read_config(path).config.eos_token_ids == ids


def test_an_end_of_generation_config_that_is_none_is_named_with_that_file(tmp_path):
    path = write(tmp_path, {}, {"eos_token_id": "</s>"})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        read_config(path)


@pytest.mark.parametrize("output", ["m.ckpt", "m.safetensors", "folder"])
def test_a_round_trip_loses_no_key(output, tmp_path):
    """HF -> ours -> HF: what transformers would read of both folders is the same."""
    oracle.write_source(tmp_path / "in", "hf")
    change = {
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.1,
        "output_router_logits": True,
        "attention_dropout": 0.1,
        "initializer_range": 0.01,
        "use_cache": False,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": None,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "id2label": {"0": "a"},
    }
    generation = {"eos_token_id": [2, 7], "temperature": 0.7, "transformers_version": "5.0"}
    write(tmp_path / "in", change, generation)
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    convert(prepare(ConvertOptions(tmp_path / "in", tmp_path / output, "ours")))
    convert(prepare(ConvertOptions(tmp_path / output, tmp_path / "back", "hf")))
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: after.get(key, GONE) for key in before} == before
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written == generation


@pytest.mark.parametrize(
    "damage",
    [
        lambda network: network.update(hidden_sizes=3),
        lambda network: network.update(hidden_size="12"),
        lambda network: network.update(theta=0.0),
        lambda network: network.update(moe_config=[1]),
        lambda network: network["moe_config"].update(expert_num=None),
        lambda network: network["moe_config"].update(num_experts_chosen=99),
        lambda network: network.update(pet_config={"lora_rank": "x"}),
    ],
)
def test_a_record_of_another_shape_is_named(damage, tmp_path):
    network = dataclasses.asdict(MixtralConfig())
    damage(network)
    path = tmp_path / "m.ckpt.json"
    path.write_text(json.dumps({FORMAT_KEY: "ours", "model_config": network}))
    with pytest.raises(UserError, match=r"m\.ckpt\.json"):
        read_config(path)


def test_what_is_written_is_read_again():
    network = MixtralConfig(theta=1e6, eos_token_id=[2, 3], pad_token_id=-1)
    written = to_huggingface(network, {}, "bfloat16")
    assert written["config.json"]["eos_token_id"] == [2, 3]
    assert written["generation_config.json"]["eos_token_id"] == [2, 3]
    assert written["config.json"]["pad_token_id"] is None
