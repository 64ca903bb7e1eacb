"""Model FLOPs utilisation: what the mathematics needs, over what the machine could do."""

import time
from dataclasses import dataclass

import numpy as np

from mixtral_ms.config.sections.model_section import MixtralConfig

_GEMM_SIZE = 1024
_GEMM_SECONDS = 0.6


def flops_per_token(config: MixtralConfig, seq_length: int) -> dict[str, float]:
    """Floating-point operations to train on one token, by term, in FLOPs; "total" sums them.

    A weight of a matrix product costs 2 FLOPs forward and 4 backward, hence 6 a token
    (PaLM, arXiv 2204.02311, appendix B), with D hidden, H heads, K kv heads, d head_dim,
    F intermediate, E experts, k chosen experts, V vocabulary, S sequence, L layers:

        attention_projections  6 L (2 H d D + 2 K d D)
        attention_scores       12 L H d S / 2       half: a causal query sees S/2 keys on average
        router                 6 L E D
        experts                6 L k 3 D F          only the chosen experts
        lm_head                6 V D

    A sliding window of W < S keys leaves W (1 - W / 2S) keys on average. Not counted, as is
    usual: embedding lookup, norms, softmax, activations, the optimizer, recomputation, and
    rows that only pad an expert's batch.
    """
    layers, hidden = config.num_layers, config.hidden_size
    query_width = config.num_heads * config.head_dim
    key_width = config.n_kv_heads * config.head_dim
    window = min(config.sliding_window or seq_length, seq_length)
    mean_keys = window * (1 - window / (2 * seq_length))
    moe = config.moe_config
    terms = {
        "attention_projections": 6 * layers * 2 * hidden * (query_width + key_width),
        "attention_scores": 12 * layers * query_width * mean_keys,
        "router": 6 * layers * moe.expert_num * hidden,
        "experts": 6 * layers * moe.num_experts_chosen * 3 * hidden * config.intermediate_size,
        "lm_head": 6 * config.vocab_size * hidden,
    }
    return {name: float(value) for name, value in terms.items()} | {
        "total": float(sum(terms.values()))
    }


@dataclass(frozen=True)
class Peak:
    """A device's highest rate in FLOP/s and where the number comes from."""

    flops_per_second: float
    source: str


def peak_flops(device_target: str, tflops: float | None = None) -> Peak | None:
    """The denominator of the MFU for one device.

    Args:
        device_target: "CPU" is measured in under a second with float32 matrix products; the
            best of several counts, as other work on the machine only ever lowers it.
        tflops: the data sheet's number in TFLOP/s, which then counts on any device.

    Returns:
        None on an accelerator without `tflops`: variants of a chip share a name and differ by
        a third, so no number is better than a guessed one.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "as given")
    if device_target.upper() != "CPU":
        return None
    return Peak(_measured_gemm(), f"float32 matrix product of {_GEMM_SIZE}, measured at start")


def _measured_gemm() -> float:
    """Best rate of a square float32 matrix product, in FLOP/s."""
    left = np.full((_GEMM_SIZE, _GEMM_SIZE), 0.5, np.float32)
    right, product = left.T.copy(), np.empty_like(left)
    best = float("inf")
    end = time.perf_counter() + _GEMM_SECONDS
    while (start := time.perf_counter()) < end:
        np.matmul(left, right, out=product)
        best = min(best, time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / best


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilisation with both its numbers, in FLOP/s for all devices together."""

    achieved_flops_per_second: float
    peak_flops_per_second: float

    @property
    def ratio(self) -> float:
        """Achieved over peak; 1 is the machine's limit."""
        return self.achieved_flops_per_second / self.peak_flops_per_second

    def __str__(self) -> str:
        achieved, peak = self.achieved_flops_per_second / 1e9, self.peak_flops_per_second / 1e9
        return f"{self.ratio:.1%} ({achieved:,.1f} of {peak:,.1f} GFLOP/s)"


def mfu(tokens_per_second: float, token_flops: float, peak: Peak, devices: int = 1) -> Mfu:
    """MFU = tokens/s x FLOPs a token / (devices x peak).

    Args:
        tokens_per_second: over all devices.
        token_flops: `flops_per_token(...)["total"]`.
        peak: one device's.
        devices: how many share the work.
    """
    return Mfu(tokens_per_second * token_flops, peak.flops_per_second * devices)
