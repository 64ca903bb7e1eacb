"""From a token's logits to the next token, in the order of transformers' logits processors.

Legend: V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from mixtral_ms.infer.engine.sampling_params import SamplingParams


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def penalise(
    scores_V: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> np.ndarray:
    """Repetition penalty over prompt and answer, then presence penalty over the answer."""
    if params.repetition_penalty == 1 and params.presence_penalty == 0:
        return scores_V
    scores_V = scores_V.copy()
    answer = np.unique(np.asarray(answer_ids, np.int64))
    if params.repetition_penalty != 1:
        seen = np.union1d(np.asarray(prompt_ids, np.int64), answer)
        old = scores_V[seen]
        scores_V[seen] = np.where(
            old < 0, old * params.repetition_penalty, old / params.repetition_penalty
        )
    scores_V[answer] -= params.presence_penalty
    return scores_V


def distribution(scores_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities to draw from: temperature, top-k, top-p, min-p; float64, sum 1."""
    scores_V = scores_V.astype(np.float64) / params.temperature
    if 0 < params.top_k < scores_V.size:
        kth = np.partition(scores_V, -params.top_k)[-params.top_k]
        scores_V[scores_V < kth] = -np.inf
    if params.top_p < 1:
        # Kept while those before it do not reach top_p, so the likeliest always is.
        order = np.argsort(-scores_V, kind="stable")
        sorted_probs = _softmax(scores_V)[order]
        before = np.cumsum(sorted_probs) - sorted_probs
        scores_V[order[1:][before[1:] >= params.top_p]] = -np.inf
    probs_V = _softmax(scores_V)
    if params.min_p > 0:
        probs_V[probs_V < params.min_p * probs_V.max()] = 0
        probs_V /= probs_V.sum()
    return probs_V


def draw_key(seed: int, prompt_ids: Sequence[int]) -> int:
    """Names the random stream of a request: another seed or another prompt has an independent one.

    The prompts of a batch share the seed. Shared draws too would let the same luck decide for all
    of them, so that a token of probability 1/2 comes for every prompt or for none.
    """
    ids = np.asarray(prompt_ids, "<i8").tobytes()
    prompt = int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")
    return prompt << 64 | seed


def pick(
    logits_V: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    key: int,
) -> int:
    """The next token: the likeliest, or a draw that depends on `draw_key` and position only."""
    scores_V = penalise(logits_V, params, prompt_ids, answer_ids)
    if params.greedy:
        return int(np.argmax(scores_V))
    cumulative = np.cumsum(distribution(scores_V, params))
    # A counter-based generator: token n is drawn with block n of the key's stream, so that
    # nothing has to be kept, or replayed when a request is computed again.
    bits = np.random.Philox(key=key, counter=len(answer_ids))
    point = np.random.Generator(bits).random() * cumulative[-1]
    chosen = int(np.searchsorted(cumulative, point, side="right"))
    # Rounding may put the point on the very end: take the last token that can be drawn.
    return min(chosen, int(np.searchsorted(cumulative, cumulative[-1])))


def _softmax(scores_V: np.ndarray) -> np.ndarray:
    weights = np.exp(scores_V - scores_V.max())
    return weights / weights.sum()
