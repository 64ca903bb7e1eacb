"""The engine on a small numpy network: every answer as if its request were alone."""

import dataclasses

import numpy as np
import pytest
from helpers.numpy_runner import NumpyRunner, random_tensors
from helpers.tiny import tiny_config
from helpers.toy_tokenizer import ToyTokenizer

from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.engine import Engine
from mixtral_ms.infer.engine.sampling_params import SamplingParams
from mixtral_ms.infer.runners.base import StepInput

CONFIG = tiny_config(seq_length=48, use_past=True)
TENSORS = random_tensors(CONFIG)
PROMPTS = ["", "a", "hello there", "one two three four five", "x" * 17, "Mixtral of", "zz", "end"]


def engine(config=CONFIG, num_blocks=128, tensors=TENSORS, **options):
    options = {"prefill_chunk": 5, **options}
    return Engine(NumpyRunner(config, tensors, num_blocks), ToyTokenizer(), config, **options)


def params(**changes):
    return SamplingParams(**{"max_new_tokens": 12, "ignore_eos": True, "logprobs": True, **changes})


def essence(generation):
    """All of an answer but its times."""
    return dataclasses.replace(generation, seconds=0.0, first_token_seconds=None)


def alone(prompt, wanted, **options):
    (answer,) = engine(**options).generate([prompt], wanted)
    return essence(answer)


def uncached(prompt_ids, count):
    """Greedy answer and log-probabilities, each token from a fresh pass over everything."""
    ids, logprobs = list(prompt_ids), []
    for _ in range(count):
        one = Engine(NumpyRunner(CONFIG, TENSORS), ToyTokenizer(), CONFIG, prefill_chunk=100)
        number = one.submit(ids, params(max_new_tokens=1))
        (event,) = one.step()
        assert event.request == number
        ids.append(event.token_id)
        logprobs.append(event.logprob)
    return ids[len(prompt_ids) :], logprobs


SAMPLED = params(do_sample=True, temperature=1.3, top_k=20, seed=5)


@pytest.mark.parametrize("wanted", [params(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_answers_as_each_request_alone(wanted, batch):
    answers = engine(max_batch_size=batch).generate(PROMPTS, wanted)
    assert [essence(one) for one in answers] == [alone(prompt, wanted) for prompt in PROMPTS]


def test_prompts_of_a_batch_draw_independently_and_as_alone():
    """The network gives two tokens the same chance; the prompts do not decide alike."""
    flat = {name: np.zeros_like(values) for name, values in TENSORS.items()}
    wanted = params(do_sample=True, max_new_tokens=1, top_k=0)
    prompts = [f"p {number}" for number in range(100)]
    answers = engine(tensors=flat).generate(prompts, wanted)
    low = sum(answer.token_ids[0] < CONFIG.vocab_size / 2 for answer in answers)
    assert abs(low - 50) < 5 * np.sqrt(100) / 2
    assert alone(prompts[7], wanted, tensors=flat).token_ids == answers[7].token_ids


def test_the_cache_changes_nothing():
    answer = alone("hello there", params())
    assert (list(answer.token_ids), list(answer.logprobs)) == uncached(
        answer.prompt_token_ids, len(answer.token_ids)
    )


def test_without_use_past_everything_is_computed_again_with_the_same_ids():
    config = dataclasses.replace(CONFIG, use_past=False)
    one = engine(config)
    answers = one.generate(PROMPTS, params())
    assert [essence(a) for a in answers] == [alone(prompt, params()) for prompt in PROMPTS]
    assert sum(len(step.token_ids_T) for step in one._runner.steps) > 20 * len(PROMPTS) * 12 / 2


@pytest.mark.parametrize("wanted", [params(max_new_tokens=20), SAMPLED], ids=["greedy", "sampled"])
def test_a_full_cache_changes_nothing(wanted):
    # 13 blocks of 4 positions hold two of the long requests, not eight.
    small = engine(num_blocks=13)
    answers = small.generate(PROMPTS, wanted)
    assert [essence(one) for one in answers] == [alone(prompt, wanted) for prompt in PROMPTS]
    assert small._scheduler.pool.free == 13


def test_requests_are_preempted_when_the_cache_is_full(monkeypatch):
    small = engine(num_blocks=13)
    stopped = []
    stop = small._scheduler._stop
    monkeypatch.setattr(small._scheduler, "_stop", lambda one: (stopped.append(one), stop(one)))
    small.generate(PROMPTS, params(max_new_tokens=20))
    assert len(stopped) > len(PROMPTS), "nothing was preempted: the cache is too large to test it"


def test_requests_join_and_leave_at_any_step():
    one = engine()
    waiting = list(PROMPTS)
    answers = {}
    while waiting or one.busy:
        if waiting:
            prompt = waiting.pop()
            answers[one.submit(prompt, params(max_new_tokens=4 + len(prompt)))] = prompt
        for event in one.step():
            if event.generation:
                prompt = answers[event.request]
                wanted = params(max_new_tokens=4 + len(prompt))
                assert essence(event.generation) == alone(prompt, wanted)
                answers[event.request] = None
    assert set(answers.values()) == {None}


def test_running_requests_go_on_while_a_prompt_is_taken_in():
    one = engine()
    first = one.submit("a", params(max_new_tokens=30))
    one.step()
    one.submit("x" * 24, params())  # 25 tokens, five pieces
    seen = [[event.request for event in one.step()].count(first) for _ in range(5)]
    assert seen == [1] * 5
    pieces = [i.positions_T.tolist() for i in one._runner.steps if i.token_ids_T.size == 5]
    assert pieces == [list(range(begin, begin + 5)) for begin in range(0, 25, 5)]


def test_prompts_share_a_step_up_to_a_bound():
    one = engine(prefill_tokens=12)
    for prompt in ("x" * 6, "yyy", "zz", "u"):
        one.submit(prompt, params())
    one.step()
    one.step()
    prefills = [i for i in one._runner.steps if len(i.token_ids_T) > len(i.starts) - 1]
    assert [np.diff(i.starts).tolist() for i in prefills] == [[5, 4, 3], [2, 2]]


@pytest.mark.parametrize("bound", [1, 9, 30])
def test_sharing_a_step_changes_nothing(bound):
    for blocks in (128, 13):
        answers = engine(prefill_tokens=bound, num_blocks=blocks).generate(PROMPTS, params())
        assert [essence(one) for one in answers] == [alone(p, params()) for p in PROMPTS]


def test_streaming_equals_generate():
    one = engine()
    for prompt in PROMPTS:
        events = list(one.stream(prompt, params(stop="zq")))
        answer = events[-1].generation
        assert essence(answer) == alone(prompt, params(stop="zq"))
        assert "".join(event.text for event in events) == answer.text
        assert tuple(event.token_id for event in events) == answer.token_ids
        assert tuple(event.logprob for event in events) == answer.logprobs


def test_two_streams_at_once():
    one = engine()
    streams = [one.stream(prompt, params()) for prompt in PROMPTS[:2]]
    pairs = list(zip(*streams, strict=True))
    for i, prompt in enumerate(PROMPTS[:2]):
        assert essence(pairs[-1][i].generation) == alone(prompt, params())


def test_a_client_that_goes_away_frees_its_blocks():
    one = engine()
    other = one.submit("other", params())
    events = one.stream("hello", params())
    next(events)
    next(events)
    events.close()
    assert list(one._requests) == [other]
    while one.busy:
        last = one.step()[-1]
    assert essence(last.generation) == alone("other", params())
    assert one._scheduler.pool.free == 128


def test_a_client_that_never_listens_is_forgotten():
    one = engine()
    events = one.stream("hello", params())
    assert one.busy
    del events
    assert not one.busy
    assert one._followed == {}


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_cancel(steps):
    one = engine(max_batch_size=2)
    numbers = [one.submit(prompt, params()) for prompt in PROMPTS[:4]]
    answers = {}

    def run():
        for event in one.step():
            if event.generation:
                answers[event.request] = essence(event.generation)

    for _ in range(steps):
        run()
    one.cancel(numbers[1])
    one.cancel(numbers[1])
    one.cancel(99)
    while one.busy:
        run()
    assert answers == {numbers[i]: alone(PROMPTS[i], params()) for i in (0, 2, 3)}


def test_nan_logits_fail_their_request_only():
    poisoned = dict(TENSORS)
    name = "model.tok_embeddings.embedding_weight"
    poisoned[name] = poisoned[name].copy()
    bad = ToyTokenizer().encode("!")[0]
    poisoned[name][bad] = np.nan
    healthy = [p for p in PROMPTS if bad not in alone(p, params()).token_ids]
    assert len(healthy) > 2
    one = engine(tensors=poisoned)
    answers = one.generate([*healthy, "a!b"], params())
    assert [essence(a) for a in answers[:-1]] == [alone(p, params()) for p in healthy]
    assert answers[-1].finish_reason == "error"
    assert "not finite" in answers[-1].error
    assert one._scheduler.pool.free == 128


def test_greedy_takes_the_likeliest_and_reports_its_logprob():
    answer = alone("hello", params(max_new_tokens=3, prompt_logprobs=True))
    runner = NumpyRunner(CONFIG, TENSORS)
    ids = [*answer.prompt_token_ids, *answer.token_ids]
    logits = runner.step(
        StepInput(
            np.array(ids, np.int32),
            np.arange(len(ids), dtype=np.int32),
            np.array([0, len(ids)], np.int32),
            np.arange(16, dtype=np.int32)[None],
            np.arange(len(ids), dtype=np.int32),
        )
    ).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    prompt = len(answer.prompt_token_ids)
    assert logits.argmax(-1)[prompt - 1 : -1].tolist() == list(answer.token_ids)
    expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
    got = [*answer.prompt_logprobs, *answer.logprobs]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_scoring_a_prompt_generates_nothing():
    wanted = params(max_new_tokens=0, prompt_logprobs=True)
    answer = alone("hello there", wanted)
    assert (answer.token_ids, answer.text, answer.finish_reason) == ((), "", "length")
    longer = alone("hello there", params(prompt_logprobs=True))
    assert answer.prompt_logprobs == longer.prompt_logprobs
    assert len(answer.prompt_logprobs) == len("hello there")


def test_eos_and_stops_end_an_answer():
    free = alone("hello", params())
    ids = free.token_ids
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    stopped = alone("hello", params(stop_token_ids=(ids[at],)))
    assert (stopped.token_ids, stopped.finish_reason) == (ids[: at + 1], "stop")
    assert stopped.text == free.text[:at]
    text = alone("hello", params(stop=free.text[at - 1 : at + 1]))
    assert (text.finish_reason, text.text) == ("stop", free.text[: at - 1])
    for eos in (ids[at], [CONFIG.vocab_size - 1, ids[at]]):  # each of several ends it
        config = dataclasses.replace(CONFIG, eos_token_id=eos)
        ended = alone("hello", params(ignore_eos=False), config=config)
        assert (ended.token_ids, ended.finish_reason) == (ids[: at + 1], "eos")
        assert ended.logprobs == free.logprobs[: at + 1]
    none = dataclasses.replace(CONFIG, eos_token_id=-1)
    assert alone("hello", params(ignore_eos=False), config=none).token_ids == ids


@pytest.mark.parametrize(
    "prompt, changes, message",
    [
        ("x" * 60, {}, r"61 tokens and the context \(seq_length\) is 48"),
        ("x" * 47, {}, "48 tokens"),
        ("x" * 20, {"max_length": 20}, "21 tokens and max_decode_length is 20"),
        ([1, 61], {}, r"id 61 is not in \[0, 61\)"),
        ([], {}, "empty"),
        ("x", {"num_beams": 40}, "num_beams 40 is above the batch size 32"),
    ],
)
def test_wrong_prompts_are_refused_and_the_others_answered(prompt, changes, message):
    one = engine()
    wanted = params(**changes)
    with pytest.raises(UserError, match=message):
        one.submit(prompt, wanted)
    with pytest.raises(UserError, match=message):
        one.stream(prompt, wanted)
    wrong, right = one.generate([prompt, "hello"], [wanted, params()])
    assert wrong.finish_reason == "error"
    assert essence(right) == alone("hello", params())


def test_what_can_never_fit_the_cache_says_both_numbers():
    small = engine(num_blocks=4)
    with pytest.raises(UserError, match="needs 6 cache blocks of 4 positions, .* has 4"):
        small.submit("hello", params(max_new_tokens=18))
    with pytest.raises(UserError, match="search of 3 beams needs .* has 4"):
        small.submit("hello", params(num_beams=3))
    # Without a wish, the cache bounds the answer.
    (answer,) = small.generate(["hello"], params(max_new_tokens=None))
    assert len(answer.prompt_token_ids) + len(answer.token_ids) == 16
    assert answer.finish_reason == "length"


def test_the_context_bounds_the_answer():
    (answer,) = engine().generate(["x" * 40], params())
    assert (len(answer.token_ids), answer.finish_reason) == (48 - 41, "length")


def test_a_tokenizer_larger_than_the_network_is_refused():
    with pytest.raises(UserError, match="62 pieces and the network vocab_size 61"):
        Engine(NumpyRunner(CONFIG, TENSORS), ToyTokenizer(62), CONFIG)


def test_beams_beside_other_requests():
    wanted = params(num_beams=3)
    answers = engine(num_blocks=60).generate(PROMPTS, [wanted, params()] * 4)
    expected = [alone(p, w) for p, w in zip(PROMPTS, [wanted, params()] * 4, strict=True)]
    assert [essence(one) for one in answers] == expected
    assert all(len(one.token_ids) == 12 for one in answers)


def test_timings():
    (answer,) = engine().generate(["hello"], params(max_new_tokens=1))
    assert 0 < answer.first_token_seconds <= answer.seconds
