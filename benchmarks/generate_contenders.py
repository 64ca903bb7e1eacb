"""The contenders of generate.py: each takes the same random weights and answers with seconds.

Nothing heavy is imported before a contender is built: llama.cpp's process needs numpy, gguf and
llama_cpp alone.
"""

import os
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_layers": 8,
    "num_heads": 8,
    "n_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "experts": 8,
    "top_k": 2,
    "theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_length": 8192 + 128,
}
CHUNK = 512  # tokens of a prompt that ours and llama.cpp take at once
SHARED = 2048 // CHUNK  # sequences whose chunks ours takes together, as its engine does


def random_weight(name: str, *shape: int) -> np.ndarray:
    """The same values for a name in every process."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def layer_weights(layer: int) -> dict[str, np.ndarray]:
    s = SIZES
    hidden, width, experts = s["hidden_size"], s["intermediate_size"], s["experts"]
    query, key = (s[n] * s["head_dim"] for n in ("num_heads", "n_kv_heads"))
    shapes = {
        "attention_norm": (hidden,),
        "wq": (query, hidden),
        "wk": (key, hidden),
        "wv": (key, hidden),
        "wo": (hidden, query),
        "ffn_norm": (hidden,),
        "router": (experts, hidden),
        "w1": (experts, width, hidden),
        "w2": (experts, hidden, width),
        "w3": (experts, width, hidden),
    }
    return {name: random_weight(f"{layer}.{name}", *shape) for name, shape in shapes.items()}


def outer_weights() -> dict[str, np.ndarray]:
    table = (SIZES["vocab_size"], SIZES["hidden_size"])
    return {
        "embedding": random_weight("embedding", *table),
        "norm": random_weight("norm", SIZES["hidden_size"]),
        "head": random_weight("head", *table),
    }


def prompt(batch: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, SIZES["vocab_size"], (batch, length)).astype(np.int32)


def threads() -> int:
    return len(os.sched_getaffinity(0))


def read_bandwidth() -> float:
    """Bytes a second that all threads read from an array far larger than the caches."""
    parts = np.array_split(np.ones(128 << 20, np.float32), threads() * 4)
    with ThreadPoolExecutor(threads()) as pool:
        return max(sum(p.nbytes for p in parts) / timed(lambda: list(pool.map(np.max, parts)))
                   for _ in range(5))  # fmt: skip


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Ours:
    """mixtral-ms: the C++ decoder."""

    def __init__(self, weight_dtype: str) -> None:
        from mixtral_ms.config import MixtralConfig
        from mixtral_ms.infer.runners.cpp_runner import CppRunner
        from mixtral_ms.infer.runners.infer_weights import InferWeights

        skip = ("experts", "top_k", "max_length")
        experts = {"expert_num": SIZES["experts"], "num_experts_chosen": SIZES["top_k"]}
        config = MixtralConfig(
            **{k: v for k, v in SIZES.items() if k not in skip}, moe_config=experts
        )
        self.block, self.filled = 16, None
        tensors = self._tensors()
        scales = {}
        for name in tensors:
            small = "norm" in name or "router" in name or "embedding" in name
            if weight_dtype == "float16" and not small:
                tensors[name] = tensors[name].astype(np.float16)
            elif weight_dtype == "int8" and not small:
                scales[name] = np.abs(tensors[name]).max(-1) / np.float32(127)
                scaled = tensors[name] / scales[name][..., None]
                tensors[name] = np.rint(scaled).astype(np.int8)
        weights = InferWeights(weight_dtype, tensors, scales)
        self.runner = CppRunner(config, weights, 2 * SIZES["max_length"] // self.block, self.block)

    @staticmethod
    def _tensors() -> dict[str, np.ndarray]:
        routed = "feed_forward.routed_experts."
        paths = {"router": routed + "router.dense"}
        paths |= {name: f"attention.{name}" for name in ("wq", "wk", "wv", "wo")}
        paths |= {name: f"{routed}ffn.{name}" for name in ("w1", "w2", "w3")}
        outer = outer_weights()
        tensors = {
            "model.tok_embeddings.embedding_weight": outer["embedding"],
            "model.norm_out.weight": outer["norm"],
            "lm_head.weight": outer["head"],
        }
        for layer in range(SIZES["num_layers"]):
            for name, value in layer_weights(layer).items():
                tensors[f"model.layers.{layer}.{paths.get(name, name)}.weight"] = value
        return tensors

    def prefill(self, batch: int, length: int) -> float:
        return timed(lambda: self._fill(batch, self._tables(batch, length), length))

    def decode(self, batch: int, context: int, tokens: int) -> float:
        tables = self._tables(batch, context + tokens)
        if self.filled != (batch, context, tokens):
            self.logits = self._fill(batch, tables, context)
            self.filled = (batch, context, tokens)

        def run() -> None:
            logits, with_logits = self.logits, np.arange(batch)
            for position in range(context, context + tokens):
                ids = logits.argmax(-1)
                positions = np.full(batch, position)
                logits = self._step(ids, positions, np.arange(batch + 1), tables, with_logits)

        return timed(run)

    def first(self, length: int) -> float:
        return float(self._fill(1, self._tables(1, length), length).argmax())

    def _tables(self, batch: int, length: int) -> np.ndarray:
        reach = -(-length // self.block)
        return np.arange(batch * reach).reshape(batch, reach)

    def _fill(self, batch: int, tables: np.ndarray, length: int) -> np.ndarray:
        """Logits after each prompt, taken into the cache."""
        self.filled, last = None, []
        ids = prompt(batch, length)
        for first in range(0, batch, SHARED):
            some = min(SHARED, batch - first)
            chosen = slice(first, first + some)
            for begin in range(0, length, CHUNK):
                end = min(begin + CHUNK, length)
                starts = np.arange(some + 1) * (end - begin)
                with_logits = starts[1:] - 1 if end == length else []
                positions = np.tile(np.arange(begin, end), some)
                step = (
                    ids[chosen, begin:end].reshape(-1),
                    positions,
                    starts,
                    tables[chosen],
                    with_logits,
                )
                logits = self._step(*step)
            last.append(logits)
        return np.concatenate(last)

    def _step(self, *arrays) -> np.ndarray:
        from mixtral_ms.infer.runners.base import StepInput

        return self.runner.step(StepInput(*(np.asarray(a, np.int32) for a in arrays)))


class Torch:
    """transformers in float32 with sdpa, each time with its fastest experts_implementation."""

    # batched_mm copies the weights of every token's experts: the slowest by far, at any batch.
    IMPLEMENTATIONS = ("eager", "grouped_mm")

    def __init__(self, _weight_dtype: str) -> None:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        self.torch, self.fastest, self.caches = torch, {}, {}
        torch.set_num_threads(threads())
        config = MixtralConfig(
            vocab_size=SIZES["vocab_size"],
            hidden_size=SIZES["hidden_size"],
            intermediate_size=SIZES["intermediate_size"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_heads"],
            num_key_value_heads=SIZES["n_kv_heads"],
            num_local_experts=SIZES["experts"],
            num_experts_per_tok=SIZES["top_k"],
            rms_norm_eps=SIZES["rms_norm_eps"],
            max_position_embeddings=SIZES["max_length"],
            rope_parameters={"rope_type": "default", "rope_theta": SIZES["theta"]},
            attn_implementation="sdpa",
            sliding_window=None,
        )
        self.model = MixtralForCausalLM(config).eval()
        self.model.load_state_dict(self._state())

    def _state(self) -> dict:
        outer = outer_weights()
        state = {
            "model.embed_tokens.weight": outer["embedding"],
            "model.norm.weight": outer["norm"],
            "lm_head.weight": outer["head"],
        }
        for layer in range(SIZES["num_layers"]):
            own, at = layer_weights(layer), f"model.layers.{layer}."
            for ours, theirs in (("wq", "q"), ("wk", "k"), ("wv", "v"), ("wo", "o")):
                state[f"{at}self_attn.{theirs}_proj.weight"] = own[ours]
            state[at + "input_layernorm.weight"] = own["attention_norm"]
            state[at + "post_attention_layernorm.weight"] = own["ffn_norm"]
            state[at + "mlp.gate.weight"] = own["router"]
            gate_up = np.concatenate([own["w1"], own["w3"]], axis=1)
            state[at + "mlp.experts.gate_up_proj"] = gate_up
            state[at + "mlp.experts.down_proj"] = own["w2"]
        return {name: self.torch.from_numpy(value) for name, value in state.items()}

    def prefill(self, batch: int, length: int) -> float:
        self._choose("prefill", batch, lambda: timed(lambda: self._fill(batch, length // 2)))
        return timed(lambda: self._fill(batch, length))

    def decode(self, batch: int, context: int, tokens: int) -> float:
        self._choose("decode", batch, lambda: self._decode(batch, context, 4))
        return self._decode(batch, context, tokens)

    def first(self, length: int) -> float:
        return float(self._fill(1, length)[0].argmax())

    def _choose(self, what: str, batch: int, trial) -> None:
        if (what, batch) not in self.fastest:
            seconds = {}
            for name in self.IMPLEMENTATIONS:
                self.model.set_experts_implementation(name)
                seconds[name] = min(trial(), trial())
            self.fastest[what, batch] = min(seconds, key=seconds.get)
            print(what, batch, {n: round(s, 3) for n, s in seconds.items()}, file=sys.stderr)
        self.model.set_experts_implementation(self.fastest[what, batch])

    def _fill(self, batch: int, length: int):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(prompt(batch, length)).long()
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], cache

    def _decode(self, batch: int, context: int, tokens: int) -> float:
        if (batch, context) not in self.caches:
            self.caches = {(batch, context): self._fill(batch, context)}
        logits, cache = self.caches[batch, context]
        cache.crop(context)

        def run() -> None:
            ids = logits.argmax(-1, keepdim=True)
            for _ in range(tokens):
                out = self.model(ids, past_key_values=cache, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)

        with self.torch.inference_mode():
            return timed(run)


class Llama:
    """llama.cpp through llama-cpp-python, the same weights as GGUF."""

    TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}

    def __init__(self, weight_dtype: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "model.gguf"
        write_gguf(path, self.TYPES[weight_dtype])
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 2 * SIZES["max_length"], CHUNK, CHUNK
        params.n_seq_max, params.kv_unified = 32, True
        params.n_threads = params.n_threads_batch = threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.filled = None

    def prefill(self, batch: int, length: int) -> float:
        return timed(lambda: self._fill(batch, length))

    def decode(self, batch: int, context: int, tokens: int) -> float:
        if self.filled != (batch, context):
            self._fill(batch, context)
        memory = self.api.llama_get_memory(self.context)
        for i in range(batch):
            self.api.llama_memory_seq_rm(memory, i, context, -1)

        def run() -> None:
            ids = np.arange(batch)
            for position in range(context, context + tokens):
                self._decode([(ids[i], position, i, True) for i in range(batch)])
                ids = np.array([self._logits(i).argmax() for i in range(batch)])

        return timed(run)

    def first(self, length: int) -> float:
        self._fill(1, length)
        return float(self._logits((length - 1) % CHUNK).argmax())

    def _fill(self, batch: int, length: int) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        for i, ids in enumerate(prompt(batch, length)):
            for begin in range(0, length, CHUNK):
                positions = range(begin, min(begin + CHUNK, length))
                self._decode([(ids[p], p, i, p == length - 1) for p in positions])
        self._logits(-1)  # waits until it is done
        self.filled = (batch, length)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            b.token[i], b.pos[i], b.logits[i] = int(token), position, wanted
            b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
        if self.api.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, row: int) -> np.ndarray:
        values = self.api.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(values, (SIZES["vocab_size"],))


def write_gguf(path: Path, kind: str) -> None:
    import gguf

    dtype = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_length"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_heads"])
    writer.add_head_count_kv(SIZES["n_kv_heads"])
    writer.add_rope_freq_base(SIZES["theta"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_expert_count(SIZES["experts"])
    writer.add_expert_used_count(SIZES["top_k"])
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: np.ndarray) -> None:
        small = value.ndim == 1 or "gate_inp" in name
        as_type = gguf.GGMLQuantizationType.F32 if small else dtype
        writer.add_tensor(name, gguf.quants.quantize(value, as_type), raw_dtype=as_type)

    outer = outer_weights()
    add("token_embd.weight", outer["embedding"])
    add("output_norm.weight", outer["norm"])
    add("output.weight", outer["head"])
    names = {"attention_norm": "attn_norm", "wv": "attn_v", "wo": "attn_output"}
    names |= {"ffn_norm": "ffn_norm", "router": "ffn_gate_inp", "wq": "attn_q", "wk": "attn_k"}
    names |= {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
    for layer in range(SIZES["num_layers"]):
        for name, value in layer_weights(layer).items():
            if name in ("wq", "wk"):  # llama.cpp rotates neighbours, not halves
                halves = value.reshape(-1, 2, SIZES["head_dim"] // 2, value.shape[1])
                value = halves.swapaxes(1, 2).reshape(value.shape)  # noqa: PLW2901
            add(f"blk.{layer}.{names[name]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTENDERS = {"ours": Ours, "torch": Torch, "llama": Llama}
