"""Hugging Face's Mixtral with random weights, and the same weights in our network."""

import numpy as np
import torch
import transformers
from mindspore import Tensor

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.model.mixtral import MixtralForCausalLM


def reference_model(config: MixtralConfig, seed: int = 0) -> transformers.MixtralForCausalLM:
    """transformers' model of our configuration, float32, with random weights and norms."""
    hf_config = transformers.MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        sliding_window=config.sliding_window,
        tie_word_embeddings=config.tie_word_embeddings,
        num_local_experts=config.moe_config.expert_num,
        num_experts_per_tok=config.moe_config.num_experts_chosen,
        initializer_range=config.init_method_std,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = transformers.MixtralForCausalLM(hf_config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would hide a norm that ignores its weight
                parameter.uniform_(0.5, 1.5)
    return model


def to_our_names(tensors: dict[str, np.ndarray], config: MixtralConfig) -> dict[str, np.ndarray]:
    """Weights, or gradients, of transformers' names under ours."""
    ours = {
        "model.tok_embeddings.embedding_weight": tensors["model.embed_tokens.weight"],
        "model.norm_out.weight": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        ours["lm_head.weight"] = tensors["lm_head.weight"]
    for layer in range(config.num_layers):
        theirs = f"model.layers.{layer}"
        gate_up = tensors[f"{theirs}.mlp.experts.gate_up_proj"]
        for ours_name, value in (
            ("attention_norm.weight", tensors[f"{theirs}.input_layernorm.weight"]),
            ("ffn_norm.weight", tensors[f"{theirs}.post_attention_layernorm.weight"]),
            ("attention.wq.weight", tensors[f"{theirs}.self_attn.q_proj.weight"]),
            ("attention.wk.weight", tensors[f"{theirs}.self_attn.k_proj.weight"]),
            ("attention.wv.weight", tensors[f"{theirs}.self_attn.v_proj.weight"]),
            ("attention.wo.weight", tensors[f"{theirs}.self_attn.o_proj.weight"]),
            (
                "feed_forward.routed_experts.router.dense.weight",
                tensors[f"{theirs}.mlp.gate.weight"],
            ),
            ("feed_forward.routed_experts.ffn.w1.weight", gate_up[:, : config.intermediate_size]),
            ("feed_forward.routed_experts.ffn.w3.weight", gate_up[:, config.intermediate_size :]),
            (
                "feed_forward.routed_experts.ffn.w2.weight",
                tensors[f"{theirs}.mlp.experts.down_proj"],
            ),
        ):
            ours[f"model.layers.{layer}.{ours_name}"] = value
    return ours


def copy_weights(source: transformers.MixtralForCausalLM, network: MixtralForCausalLM) -> None:
    """Give the network transformers' weights; every parameter exactly once."""
    tensors = {n: p.detach().numpy() for n, p in source.named_parameters()}
    weights = to_our_names(tensors, network.config)
    targets = {p.name: p for p in network.trainable_params()}
    assert weights.keys() == targets.keys()
    for name, parameter in targets.items():
        assert parameter.shape == weights[name].shape, name
        parameter.set_data(Tensor(np.ascontiguousarray(weights[name])))


def gradients(source: transformers.MixtralForCausalLM, config: MixtralConfig) -> dict:
    """transformers' gradients after backward(), under our names."""
    return to_our_names({n: p.grad.numpy() for n, p in source.named_parameters()}, config)
