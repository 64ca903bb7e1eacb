"""The routing rules of the Mixtral layer in plain numpy, written from their description alone.

Loops instead of vector tricks, float64, nothing shared with the package. Legend: T tokens,
E experts, k experts a token, D hidden.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Routed:
    """What one layer decides.

    Attributes:
        experts: (T, k) chosen experts, best first.
        gates: (T, k) weights after dropping; not renormalised.
        kept: (T, k) whether the assignment has a slot.
        counts: (E,) assignments of real tokens before dropping.
        capacity: slots of an expert, None without limit.
        aux: E * sum_e f_e P_e.
        z: mean of squared logsumexp.
    """

    experts: np.ndarray
    gates: np.ndarray
    kept: np.ndarray
    counts: np.ndarray
    capacity: int | None
    aux: float
    z: float


def capacity_of(tokens: int, k: int, experts: int, factor: float, tensor_parallel: int = 1) -> int:
    """min(ceil(k N factor / E), N), up to a multiple of the experts' tensor-parallel size."""
    slots = min(math.ceil(k * tokens * factor / experts), tokens)
    while slots % tensor_parallel:
        slots += 1
    return slots


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of one row in float64."""
    exponentials = [math.exp(value - max(logits)) for value in logits.astype(np.float64)]
    return np.array(exponentials) / sum(exponentials)


def route(
    logits_TE: np.ndarray,
    k: int,
    capacity_factor: float,
    sdrop: bool,
    valid_T: np.ndarray,
    uniform: bool = False,
) -> Routed:
    """Apply the rules to router logits; tokens that are not valid are padding."""
    tokens, experts = logits_TE.shape
    probabilities = np.array([softmax(row) for row in logits_TE])
    chosen = np.zeros((tokens, k), int)
    gates = np.zeros((tokens, k))
    for t in range(tokens):
        order = sorted(range(experts), key=lambda e: -probabilities[t, e])  # noqa: B023
        chosen[t] = [(t * k + j) % experts for j in range(k)] if uniform else order[:k]
        best = probabilities[t, chosen[t]]
        gates[t] = best / (best.sum() + 1e-9)
    capacity = None
    if capacity_factor > 0:
        capacity = capacity_of(tokens, k, experts, capacity_factor)
    kept = hand_out_slots(chosen, experts, capacity, sdrop, valid_T)
    counts = np.zeros(experts, int)
    for t in range(tokens):
        for j in range(k):
            counts[chosen[t, j]] += int(valid_T[t])
    real = [t for t in range(tokens) if valid_T[t]]
    aux, z = 0.0, 0.0
    if real:
        mean = probabilities[real].mean(0)
        aux = experts * sum(counts[e] / (len(real) * k) * mean[e] for e in range(experts))
        z = float(np.mean([_log_sum_exp(logits_TE[t]) ** 2 for t in real]))
    return Routed(chosen, np.where(kept, gates, 0.0), kept, counts, capacity, aux, z)


def hand_out_slots(
    chosen_Tk: np.ndarray, experts: int, capacity: int | None, sdrop: bool, valid_T: np.ndarray
) -> np.ndarray:
    """kept_Tk. sdrop: token by token; otherwise all first choices, then all second choices."""
    tokens, k = chosen_Tk.shape
    if sdrop:
        turns = [(t, j) for t in range(tokens) for j in range(k)]
    else:
        turns = [(t, j) for j in range(k) for t in range(tokens)]
    used = [0] * experts
    kept = np.zeros((tokens, k), bool)
    for t, j in turns:
        expert = chosen_Tk[t, j]
        if valid_T[t] and (capacity is None or used[expert] < capacity):
            used[expert] += 1
            kept[t, j] = True
    return kept


def swiglu_expert(x_D: np.ndarray, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """One expert on one token, float64."""
    gate, up = w1.astype(np.float64) @ x_D, w3.astype(np.float64) @ x_D
    return w2.astype(np.float64) @ (gate / (1.0 + np.exp(-gate)) * up)


def moe(
    x_TD: np.ndarray, routed: Routed, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray
) -> np.ndarray:
    """y_TD: each token's kept experts, weighted by their gates."""
    y_TD = np.zeros(x_TD.shape)
    for t, row in enumerate(routed.experts):
        for j, e in enumerate(row):
            if routed.kept[t, j]:
                y_TD[t] += routed.gates[t, j] * swiglu_expert(
                    x_TD[t].astype(np.float64), w1[e], w3[e], w2[e]
                )
    return y_TD


def _log_sum_exp(row: np.ndarray) -> float:
    row = row.astype(np.float64)
    return float(row.max() + np.log(np.exp(row - row.max()).sum()))
