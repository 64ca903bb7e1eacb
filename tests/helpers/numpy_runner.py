"""The runner's contract in numpy, one token after the other: slow, plain and bit-stable."""

import numpy as np

from mixtral_ms.infer.runners.base import Runner
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes


def random_tensors(config, seed=0, std=0.3):
    """Random float32 values for every parameter; norms lie around 1."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        values = generator.standard_normal(shape, np.float32) * np.float32(std)
        tensors[name] = values + 1 if len(shape) == 1 and "norm" in name else values
    return tensors


class NumpyRunner(Runner):
    """Computes each token on its own, so that nothing depends on what else is in the step."""

    name = "numpy"

    def __init__(self, config, tensors, num_blocks=64, block_size=4):
        self.config, self.tensors = config, tensors
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (config.num_layers, num_blocks * block_size, config.n_kv_heads, config.head_dim)
        # NaN marks what was never written: reading it shows.
        self.keys, self.values = np.full(shape, np.nan, np.float32), np.full(shape, np.nan)
        self.steps = []

    def step(self, inputs):
        self.steps.append(inputs)
        hidden = [None] * len(inputs.token_ids_T)
        for i, (begin, end) in enumerate(zip(inputs.starts, inputs.starts[1:], strict=False)):
            slots = self._slots(inputs.block_tables_NM[i], inputs.positions_T[end - 1] + 1)
            for t in range(begin, end):
                hidden[t] = self._token(inputs.token_ids_T[t], inputs.positions_T[t], slots)
        head = self.tensors.get(
            "lm_head.weight", self.tensors["model.tok_embeddings.embedding_weight"]
        )
        rows = [head @ hidden[t] for t in inputs.logit_tokens_R]
        return np.array(rows, np.float32).reshape(len(rows), self.config.vocab_size)

    def copy_blocks(self, pairs):
        for source, target in pairs:
            size = self.block_size
            for cache in (self.keys, self.values):
                cache[:, target * size : (target + 1) * size] = cache[
                    :, source * size : (source + 1) * size
                ]

    def _slots(self, table, length):
        positions = np.arange(length)
        blocks = table[positions // self.block_size]
        assert (blocks >= 0).all(), "a position has no block"
        return blocks * self.block_size + positions % self.block_size

    def _token(self, token, position, slots):
        x = self.tensors["model.tok_embeddings.embedding_weight"][token]
        for layer in range(self.config.num_layers):
            x = x + self._attention(layer, self._norm(x, layer, "attention_norm"), position, slots)
            x = x + self._experts(layer, self._norm(x, layer, "ffn_norm"))
        return self._normed(x, self.tensors["model.norm_out.weight"])

    def _weight(self, layer, name):
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, x, layer, name):
        return self._normed(x, self._weight(layer, name))

    def _normed(self, x, weight):
        return x / np.sqrt(np.mean(x * x) + np.float32(self.config.rms_norm_eps)) * weight

    def _attention(self, layer, x, position, slots):
        config, d = self.config, self.config.head_dim
        q, k, v = (self._weight(layer, f"attention.{name}") @ x for name in ("wq", "wk", "wv"))
        self.keys[layer, slots[position]] = self._rotated(k.reshape(-1, d), position)
        self.values[layer, slots[position]] = v.reshape(-1, d)
        low = max(0, position + 1 - config.sliding_window) if config.sliding_window else 0
        seen = slots[low : position + 1]
        q = self._rotated(q.reshape(config.n_kv_heads, -1, d), position)
        out = []
        for head in range(config.n_kv_heads):
            scores = q[head] @ self.keys[layer, seen, head].T / np.sqrt(d)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights @ self.values[layer, seen, head] / weights.sum(-1, keepdims=True))
        return self._weight(layer, "attention.wo") @ np.concatenate(out).reshape(-1)

    def _rotated(self, x, position):
        half = self.config.head_dim // 2
        angles = position * self.config.theta ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return np.concatenate(turned, -1).astype(np.float32)

    def _experts(self, layer, x):
        routed = "feed_forward.routed_experts."
        logits = self._weight(layer, routed + "router.dense") @ x
        chosen = np.argsort(-logits)[: self.config.moe_config.num_experts_chosen]
        gates = np.exp(logits[chosen] - logits[chosen].max())
        w1, w3, w2 = (self._weight(layer, f"{routed}ffn.{name}") for name in ("w1", "w3", "w2"))
        total = np.zeros_like(x)
        for gate, expert in zip(gates / gates.sum(), chosen, strict=True):
            a = w1[expert] @ x
            total += gate * (w2[expert] @ (a / (1 + np.exp(-a)) * (w3[expert] @ x)))
        return total
