"""Weights with random values in every format, each made by hand from Hugging Face's."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig

VOCABULARY, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD = 20, 12, 10, 4, 2, 6
LAYERS = 2


def network(**changes):
    """Our configuration of a network of these sizes, with 3 experts."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH}
    sizes |= {"num_layers": LAYERS, "num_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": HEAD}
    return MixtralConfig(**{**sizes, "moe_config": MoEConfig(expert_num=3), **changes})


def huggingface(experts, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal(shape).astype(dtype)

    weights = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = draw(HIDDEN)
        weights[f"{at}.self_attn.q_proj.weight"] = draw(HEADS * HEAD, HIDDEN)
        weights[f"{at}.self_attn.k_proj.weight"] = draw(KV_HEADS * HEAD, HIDDEN)
        weights[f"{at}.self_attn.v_proj.weight"] = draw(KV_HEADS * HEAD, HIDDEN)
        weights[f"{at}.self_attn.o_proj.weight"] = draw(HIDDEN, HEADS * HEAD)
        weights[f"{at}.post_attention_layernorm.weight"] = draw(HIDDEN)
        weights[f"{at}.block_sparse_moe.gate.weight"] = draw(experts, HIDDEN)
        for expert in range(experts):
            one = f"{at}.block_sparse_moe.experts.{expert}"
            weights[f"{one}.w1.weight"] = draw(WIDTH, HIDDEN)
            weights[f"{one}.w2.weight"] = draw(HIDDEN, WIDTH)
            weights[f"{one}.w3.weight"] = draw(WIDTH, HIDDEN)
    return weights | {"model.norm.weight": draw(HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}


def experts_of(weights, layer, which):
    at = f"model.layers.{layer}.block_sparse_moe.experts"
    count = sum(name.startswith(at) and name.endswith(".w1.weight") for name in weights)
    return np.stack([weights[f"{at}.{expert}.{which}.weight"] for expert in range(count)])


def mindspore(weights, infix, transposed):
    result = {
        "model.tok_embeddings.embedding_weight": weights["model.embed_tokens.weight"],
        "model.norm_out.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}", f"model.layers.{layer}"
        for a, b in (
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attention.wq", "self_attn.q_proj"),
            ("attention.wk", "self_attn.k_proj"),
            ("attention.wv", "self_attn.v_proj"),
            ("attention.wo", "self_attn.o_proj"),
            (f"feed_forward.{infix}router.dense", "block_sparse_moe.gate"),
        ):
            result[f"{ours}.{a}.weight"] = weights[f"{theirs}.{b}.weight"]
        for which in ("w1", "w2", "w3"):
            stack = experts_of(weights, layer, which)
            name = f"{ours}.feed_forward.{infix}ffn.{which}.weight"
            result[name] = np.ascontiguousarray(stack.swapaxes(1, 2)) if transposed else stack
    return result


def fused(weights):
    result = {name: value for name, value in weights.items() if "block_sparse_moe" not in name}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp"
        gate_up = [experts_of(weights, layer, which) for which in ("w1", "w3")]
        result[f"{at}.gate.weight"] = weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        result[f"{at}.experts.gate_up_proj"] = np.concatenate(gate_up, axis=1)
        result[f"{at}.experts.down_proj"] = experts_of(weights, layer, "w2")
    return result


def paired(matrix):
    """Rows of each head in the order in which Mistral's code rotates them: as neighbours."""
    result = np.empty_like(matrix)
    for head in range(len(matrix) // HEAD):
        for row in range(HEAD // 2):
            result[head * HEAD + 2 * row] = matrix[head * HEAD + row]
            result[head * HEAD + 2 * row + 1] = matrix[head * HEAD + HEAD // 2 + row]
    return result


def native(weights, stacked):
    result = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(LAYERS):
        theirs, at = f"model.layers.{layer}", f"layers.{layer}"
        result[f"{at}.attention_norm.weight"] = weights[f"{theirs}.input_layernorm.weight"]
        result[f"{at}.ffn_norm.weight"] = weights[f"{theirs}.post_attention_layernorm.weight"]
        result[f"{at}.attention.wq.weight"] = paired(weights[f"{theirs}.self_attn.q_proj.weight"])
        result[f"{at}.attention.wk.weight"] = paired(weights[f"{theirs}.self_attn.k_proj.weight"])
        result[f"{at}.attention.wv.weight"] = weights[f"{theirs}.self_attn.v_proj.weight"]
        result[f"{at}.attention.wo.weight"] = weights[f"{theirs}.self_attn.o_proj.weight"]
        router = weights[f"{theirs}.block_sparse_moe.gate.weight"]
        if stacked:
            result[f"{at}.block_sparse_moe.gate.weight"] = router
            for which in ("w1", "w2", "w3"):
                experts = list(experts_of(weights, layer, which))
                rows = [one.T if which == "w2" else one for one in experts]
                result[f"{at}.block_sparse_moe.{which}"] = np.concatenate(rows)
        else:
            result[f"{at}.feed_forward.gate.weight"] = router
            for which in ("w1", "w2", "w3"):
                for expert, matrix in enumerate(experts_of(weights, layer, which)):
                    result[f"{at}.feed_forward.experts.{expert}.{which}.weight"] = matrix
    return result


MAKERS = {
    "hf": lambda weights: weights,
    "hf_fused": fused,
    "ours": lambda weights: mindspore(weights, "routed_experts.", transposed=False),
    "gmm": lambda weights: mindspore(weights, "routed_experts.", transposed=True),
    "mindformers_old": lambda weights: mindspore(weights, "", transposed=False),
    "gmm_old": lambda weights: mindspore(weights, "", transposed=True),
    "native": lambda weights: native(weights, stacked=False),
    "native_stacked": lambda weights: native(weights, stacked=True),
}


def config_json(experts, **changes):
    return {
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        **changes,
    }


def write_source(folder: Path, name: str, experts: int = 3, dtype=np.float32, **config) -> dict:
    """A folder of the format `name`, as its own system would write it; returns HF's tensors."""
    folder.mkdir()
    weights = huggingface(experts, dtype)
    tensors = {key: np.ascontiguousarray(value) for key, value in MAKERS[name](weights).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(experts, **config)))
    return weights


def tensors_in(path):
    if path.is_dir():
        found = {}
        for file in sorted(path.rglob("*.safetensors")):
            found |= safetensors.numpy.load_file(file)
        return found
    return safetensors.numpy.load_file(path)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)
