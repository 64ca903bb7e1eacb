"""Sampling against transformers' processors, an exact distribution, and its own promises."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as reference

from mixtral_ms.infer.engine.sampler import distribution, draw_key, log_softmax, penalise, pick
from mixtral_ms.infer.engine.sampling_params import SamplingParams

VOCABULARY = 50


def logits_row(seed=0, size=VOCABULARY):
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def params(**changes):
    return SamplingParams(**{"do_sample": True, **changes})


def drawn(row, wanted, prompt=(), answer=()):
    return pick(row, wanted, prompt, answer, draw_key(wanted.seed, prompt))


def naive(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution in words of one syllable: python floats and sorted lists."""
    scores = {i: float(x) / temperature for i, x in enumerate(logits)}
    ranked = sorted(scores, key=lambda i: -scores[i])
    kept = ranked[: top_k or len(ranked)]
    weights = {i: math.exp(scores[i]) for i in kept}
    total = sum(weights.values())
    nucleus, reached = [], 0.0
    for i in kept:
        if reached >= top_p and nucleus:
            break
        nucleus.append(i)
        reached += weights[i] / total
    likely = [i for i in nucleus if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in likely)
    return np.array([weights[i] / total if i in likely else 0.0 for i in range(len(logits))])


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 500},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 2.5, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution_equals_transformers_and_a_naive_one(setting):
    for seed in range(20):
        row = logits_row(seed)
        scores = torch.tensor(row)[None]
        chain = [
            reference.TemperatureLogitsWarper(setting.get("temperature", 1.0)),
            reference.TopKLogitsWarper(setting.get("top_k", 0) or VOCABULARY),
            reference.TopPLogitsWarper(setting.get("top_p", 1.0)),
            reference.MinPLogitsWarper(setting.get("min_p", 0.0)),
        ]
        for one in chain:
            scores = one(None, scores)
        got = distribution(row, params(**setting))
        np.testing.assert_allclose(got, scores.softmax(-1)[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(got, naive(row, **setting), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    row, prompt, answer = logits_row(1), [1, 4, 4, 9], [30, 9, 2]
    one = reference.RepetitionPenaltyLogitsProcessor(penalty)
    expected = one(torch.tensor([prompt + answer]), torch.tensor(row)[None])[0].numpy()
    before = row.copy()
    got = penalise(row, params(repetition_penalty=penalty), prompt, answer)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(row, before)


def test_presence_penalty_counts_answers_once():
    row = logits_row(2)
    got = penalise(row, params(presence_penalty=0.5), [1, 2], [7, 7, 3])
    expected = row.copy()
    expected[[3, 7]] -= 0.5
    np.testing.assert_array_equal(got, expected)


def test_log_softmax():
    rows = np.stack([logits_row(3), logits_row(4) + 1e4])
    expected = torch.tensor(rows, dtype=torch.float64).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(rows), expected, atol=1e-9)


@pytest.mark.parametrize("greedy", [{"do_sample": False}, {"temperature": 0}])
def test_greedy_takes_the_likeliest(greedy):
    row = logits_row(5)
    assert drawn(row, params(**greedy)) == int(row.argmax())
    banned = params(**greedy, presence_penalty=100.0)
    assert drawn(row, banned, [], [int(row.argmax())]) == int(np.argsort(-row)[1])


@pytest.mark.parametrize("along", ["seeds", "positions"])
@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 1.5, "top_k": 12}, {"top_p": 0.9, "min_p": 0.02}],
    ids=str,
)
def test_frequencies_follow_the_distribution(setting, along):
    """Chi-square: a correct sampler fails once in 100,000 runs, and these runs are always alike."""
    row, draws = logits_row(6), 8000
    if along == "seeds":
        tokens = [drawn(row, params(seed=seed, **setting), [], [0]) for seed in range(draws)]
    else:
        wanted = params(seed=3, **setting)
        tokens = [drawn(row, wanted, [], range(n)) for n in range(draws)]
    expected = naive(row, **setting) * draws
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    rare = (expected < 5) & (expected > 0)
    observed = np.append(counts[expected >= 5], counts[rare].sum())
    wanted_counts = np.append(expected[expected >= 5], expected[rare].sum())
    if not rare.any():
        observed, wanted_counts = observed[:-1], wanted_counts[:-1]
    statistic = ((observed - wanted_counts) ** 2 / wanted_counts).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-5, len(observed) - 1)


def test_a_draw_depends_on_seed_prompt_and_position_only():
    row = np.zeros(VOCABULARY, np.float32)

    def answer(seed, prompt):
        return [drawn(row, params(seed=seed), prompt, range(n)) for n in range(50)]

    first = answer(11, [1, 2, 3])
    assert first == answer(11, [1, 2, 3])
    assert len(set(first)) > 20
    others = [answer(12, [1, 2, 3]), answer(11, [1, 2, 4]), answer(11, [3, 2, 1]), answer(11, [])]
    for other in others:
        assert np.mean(np.array(first) == other) < 0.2


@pytest.mark.parametrize("position", [0, 1, 30])
def test_draws_for_the_prompts_of_a_batch_are_independent(position):
    """Of 200 prompts with two equally likely tokens about half take each, for every seed."""
    row = np.zeros(2, np.float32)
    prompts = [[1, *prompt] for prompt in np.random.default_rng(0).integers(3, 99, (200, 4))]
    took = np.array(
        [[drawn(row, params(seed=seed), p, range(position)) for p in prompts] for seed in range(20)]
    )
    sigma = math.sqrt(200) / 2
    assert np.abs(took.sum(1) - 100).max() < 5 * sigma
    # Nor do two seeds share their luck.
    agreement = [(took[i] == took[j]).sum() for i in range(20) for j in range(i)]
    assert np.abs(np.array(agreement) - 100).max() < 5 * sigma


def test_impossible_tokens_are_never_drawn():
    row = np.full(VOCABULARY, -np.inf, np.float32)
    row[[3, 8]] = 0
    tokens = {drawn(row, params(seed=seed)) for seed in range(200)}
    assert tokens == {3, 8}
