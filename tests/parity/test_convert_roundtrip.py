"""Converted weights compute what transformers computes, and come back bit for bit."""

import hashlib
import json

import mindspore
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml
from helpers import hf
from helpers.tiny import random_ids, tiny_config
from mindspore import Tensor
from safetensors.torch import load_file, save_file

from mixtral_ms.checkpoint.store.store import load_checkpoint
from mixtral_ms.config import load_config
from mixtral_ms.convert.formats.foreign_config import read_config
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.model.mixtral import MixtralForCausalLM

pytestmark = pytest.mark.usefixtures("pynative")

TOLERANCE = 1e-4
EXPERTS = [3, 8]


def config_of(experts):
    return tiny_config(
        theta=1e4, seq_length=19, moe_config={"expert_num": experts, "num_experts_chosen": 2}
    )


def saved(folder, experts, dtype=torch.float32, **options):
    """A checkpoint that transformers wrote, in several files."""
    config = config_of(experts)
    model = hf.reference_model(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="30KB", **options)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return config, model


def run(source, output, to, **options):
    return convert(prepare(ConvertOptions(source, output, to, **options)))


def hashes(folder):
    """Hash of every tensor, by torch."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {
        name: (
            str(value.dtype),
            tuple(value.shape),
            hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, value in tensors.items()
    }


def open_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", attn_implementation="eager"
    )


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()


def our_logits(folder, config, ids):
    """Of the checkpoint in `folder`, with the configuration that the conversion wrote."""
    load_checkpoint(folder)  # raises unless every hash is the manifest's
    written = read_config(folder / "state.json").config
    for key in ("theta", "num_heads", "n_kv_heads", "head_dim", "rms_norm_eps", "num_layers"):
        assert getattr(written, key) == getattr(config, key)
    written.compute_dtype = "float32"
    network = MixtralForCausalLM(written)
    tensors = safetensors.numpy.load_file(folder / "rank_0" / "model.safetensors")
    parameters = {parameter.name: parameter for parameter in network.trainable_params()}
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(tensors[name]))
    network.set_train(False)
    return network(Tensor(ids)).asnumpy()


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path, experts, dtype):
    saved(tmp_path / "hf", experts, dtype)
    expected = hashes(tmp_path / "hf")
    for step, (to, name) in enumerate([("ours", "a"), ("gmm", "b.ckpt"), ("ours", "c.ckpt")]):
        source = [tmp_path / "hf", tmp_path / "a", tmp_path / "b.ckpt"][step]
        run(source, tmp_path / name, to)
    run(tmp_path / "c.ckpt", tmp_path / "back", "hf", max_shard_bytes=30_000)
    assert hashes(tmp_path / "back") == expected


@pytest.mark.parametrize("experts", EXPERTS)
def test_logits_of_ours(tmp_path, experts, record_error):
    config, model = saved(tmp_path / "hf", experts)
    run(tmp_path / "hf", tmp_path / "ours", "ours")
    ids = random_ids(config)
    got = our_logits(tmp_path / "ours", config, ids)
    record_error("logits", got, their_logits(model, ids), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_what_we_write(tmp_path, dtype):
    config, _ = saved(tmp_path / "hf", 3, dtype)
    run(tmp_path / "hf", tmp_path / "ours.ckpt", "ours")
    run(tmp_path / "ours.ckpt", tmp_path / "back", "hf", max_shard_bytes=30_000)
    opened, info = open_by_transformers(tmp_path / "back")
    original, _ = open_by_transformers(tmp_path / "hf")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.dtype == dtype
    assert opened.config.rope_parameters["rope_theta"] == config.theta
    assert opened.config.num_experts_per_tok == 2
    ids = random_ids(config)
    np.testing.assert_array_equal(their_logits(opened, ids), their_logits(original, ids))
    assert opened.generation_config.eos_token_id == 2


def test_config_json_is_for_older_releases_too(tmp_path):
    """transformers 4 reads rope_theta and torch_dtype at the top."""
    saved(tmp_path / "hf", 3)
    run(tmp_path / "hf", tmp_path / "back", "hf", dtype="bfloat16")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 1e4
    assert config["torch_dtype"] == "bfloat16"
    assert config["architectures"] == ["MixtralForCausalLM"]


def test_parameters_as_they_are_in_memory(tmp_path):
    """What torch saves of transformers 5's model itself."""
    saved(tmp_path / "hf", 3)
    model = hf.reference_model(config_of(3))
    (tmp_path / "memory").mkdir()
    torch.save(model.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    (tmp_path / "memory" / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    run(tmp_path / "memory", tmp_path / "back", "hf")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


def to_pairs(weight, heads):
    """The permutation of transformers' conversion script, backwards: halves to pairs."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def native_release(folder, config, stacked, parts):
    """What Mistral would have released of the weights that `reference_model` makes."""
    theirs = hf.reference_model(config).state_dict()
    weights = {
        "tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        old, new = f"model.layers.{layer}", f"layers.{layer}"
        weights[f"{new}.attention_norm.weight"] = theirs[f"{old}.input_layernorm.weight"]
        weights[f"{new}.ffn_norm.weight"] = theirs[f"{old}.post_attention_layernorm.weight"]
        for name, heads in (("q", config.num_heads), ("k", config.n_kv_heads)):
            weight = theirs[f"{old}.self_attn.{name}_proj.weight"]
            weights[f"{new}.attention.w{name}.weight"] = to_pairs(weight, heads)
        for name in "vo":
            weights[f"{new}.attention.w{name}.weight"] = theirs[
                f"{old}.self_attn.{name}_proj.weight"
            ]
        gate_up = theirs[f"{old}.mlp.experts.gate_up_proj"]
        w1, w3 = gate_up.chunk(2, dim=1)
        w2 = theirs[f"{old}.mlp.experts.down_proj"]
        router = theirs[f"{old}.mlp.gate.weight"]
        if stacked:
            moe = f"{new}.block_sparse_moe"
            weights[f"{moe}.gate.weight"] = router
            weights[f"{moe}.w1"] = w1.flatten(0, 1)
            weights[f"{moe}.w2"] = w2.transpose(1, 2).flatten(0, 1)
            weights[f"{moe}.w3"] = w3.flatten(0, 1)
        else:
            weights[f"{new}.feed_forward.gate.weight"] = router
            for expert in range(len(w1)):
                one = f"{new}.feed_forward.experts.{expert}"
                for name, stack in (("w1", w1), ("w2", w2), ("w3", w3)):
                    weights[f"{one}.{name}.weight"] = stack[expert].clone()
    folder.mkdir()
    path = folder / "consolidated.00.pth"
    torch.save(weights, path)
    if parts:
        data = path.read_bytes()
        path.unlink()
        step = len(data) // parts + 1
        for part in range(parts):
            piece = data[part * step : (part + 1) * step]
            (folder / f"{path.name}-split{part}").write_bytes(piece)
    moe = {"num_experts": config.moe_config.expert_num, "num_experts_per_tok": 2}
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.theta,
        "moe": moe,
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")


@pytest.mark.parametrize("parts", [0, 11])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_native_release(tmp_path, stacked, parts, record_error):
    config = config_of(3)
    native_release(tmp_path / "native", config, stacked, parts)
    expected = their_logits(hf.reference_model(config), ids := random_ids(config))
    run(tmp_path / "native", tmp_path / "hf", "hf")
    opened, _ = open_by_transformers(tmp_path / "hf")
    np.testing.assert_array_equal(their_logits(opened, ids), expected)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"a tokenizer"
    run(tmp_path / "native", tmp_path / "ours", "ours")
    got = our_logits(tmp_path / "ours", config, ids)
    record_error("logits", got, expected, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("file", ["a.ckpt", "a.safetensors"])
def test_mindspore_reads_the_files(tmp_path, dtype, file):
    config, model = saved(tmp_path / "hf", 3)
    run(tmp_path / "hf", tmp_path / file, "gmm", dtype=dtype)
    format_ = {"format": "safetensors"} if file.endswith("safetensors") else {}
    read = mindspore.load_checkpoint(str(tmp_path / file), **format_)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    expected = hf.to_our_names({n: v.numpy() for n, v in tensors.items()}, config)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        grouped = ".ffn." in name
        cast = torch.from_numpy(value.copy()).to(getattr(torch, dtype)).float().numpy()
        got = read[name].astype(mindspore.float32).asnumpy()
        assert str(read[name].dtype).lower() == dtype
        np.testing.assert_array_equal(got, cast.swapaxes(1, 2) if grouped else cast, name)


def test_the_yaml_has_the_network(tmp_path):
    config, _ = saved(tmp_path / "hf", 3)
    run(tmp_path / "hf", tmp_path / "a.ckpt", "ours", emit_yaml=tmp_path / "model.yaml")
    assert set(yaml.safe_load((tmp_path / "model.yaml").read_text())) == {"model", "moe_config"}
    model = load_config(tmp_path / "model.yaml").model.model_config
    for key in ("hidden_size", "theta", "head_dim", "n_kv_heads", "sliding_window", "vocab_size"):
        assert getattr(model, key) == getattr(config, key)
    assert model.moe_config.expert_num == 3
    (tmp_path / "a.ckpt.json").unlink()
    run(tmp_path / "a.ckpt", tmp_path / "back", "hf", config=tmp_path / "model.yaml")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


def test_fused_tensors_in_safetensors(tmp_path):
    """The same names by safetensors, as a training system may write them."""
    saved(tmp_path / "hf", 8)
    tensors = {n: v.contiguous() for n, v in hf.reference_model(config_of(8)).state_dict().items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    run(tmp_path / "in", tmp_path / "back", "hf")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
