"""The table of networks that training and every runner must agree on."""

from dataclasses import dataclass, field

from helpers.tiny import tiny_config
from mixtral_ms.config.sections.model_section import MixtralConfig


@dataclass(frozen=True)
class NetworkCase:
    """Changes of a tiny network of one layer."""

    sizes: dict = field(default_factory=dict)
    moe: dict = field(default_factory=dict)

    def config(self, seq_length: int) -> MixtralConfig:
        changes = {"seq_length": seq_length, "num_layers": 1, "pad_token_id": -1, **self.sizes}
        return tiny_config(**changes, moe_config=self.moe)


# In turn of 5 and 7 experts: with 4 of them, a position and a number in some piece would mean the
# same one. Equal scores are no case: MindSpore's TopK says nothing of who wins them.
NETWORKS = {
    "as it is": NetworkCase(),
    "top 1": NetworkCase(moe={"num_experts_chosen": 1}),
    "top 1, not renormalised": NetworkCase(moe={"num_experts_chosen": 1, "norm_topk_prob": False}),
    "top 3 of 5": NetworkCase(moe={"expert_num": 5, "num_experts_chosen": 3}),
    "top 4 of 16": NetworkCase(moe={"expert_num": 16, "num_experts_chosen": 4}),
    "all experts": NetworkCase(moe={"expert_num": 3, "num_experts_chosen": 3}),
    "not renormalised": NetworkCase(moe={"norm_topk_prob": False}),
    "in turn": NetworkCase(moe={"expert_num": 5, "uniform_routing": True}),
    "in turn, not renormalised": NetworkCase(
        moe={
            "expert_num": 7,
            "num_experts_chosen": 3,
            "uniform_routing": True,
            "norm_topk_prob": False,
        }
    ),
    "jitter of training": NetworkCase(moe={"router_jitter": 0.5}),
    "capacity of training": NetworkCase(moe={"capacity_factor": 100.0}),
    "window": NetworkCase({"sliding_window": 5}),
    "tied": NetworkCase({"tie_word_embeddings": True}),
    "wide heads": NetworkCase({"head_dim": 18, "num_heads": 3, "n_kv_heads": 3}),
    "one kv head": NetworkCase({"n_kv_heads": 1}),
    "biases": NetworkCase({"qkv_has_bias": True, "attn_proj_has_bias": True}),
    "another theta": NetworkCase({"theta": 1e6}),
    "another eps": NetworkCase({"rms_norm_eps": 0.1}),
    "odd sizes": NetworkCase({"hidden_size": 21, "intermediate_size": 37, "num_layers": 3}),
}
