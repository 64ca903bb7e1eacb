"""What a request may ask for, and how it is told what it may not."""

import pytest
from helpers.tiny import tiny_config

from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("max_new_tokens", -1, "a whole number, at least 0"),
        ("max_new_tokens", 1.5, "a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("max_length", 0, "at least 1"),
        ("temperature", -0.1, "a number, at least 0"),
        ("temperature", float("nan"), "a number"),
        ("temperature", "hot", "a number"),
        ("top_k", -1, "at least 0"),
        ("top_k", None, "at least 0"),
        ("top_p", 0, "above 0, at most 1"),
        ("top_p", 1.1, "at most 1"),
        ("min_p", 2, "at most 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", float("inf"), "a number"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at most"),
        ("num_beams", 0, "at least 1"),
        ("stop", ("",), "at least one character"),
        ("stop_token_ids", (-3,), "at least 0"),
    ],
)
def test_what_is_out_of_range_is_named(name, value, allowed):
    with pytest.raises(UserError, match=name) as caught:
        SamplingParams(**{name: value})
    assert allowed in str(caught.value)


def test_beams_do_not_go_with_sampling_or_stop_strings():
    with pytest.raises(UserError, match="num_beams 2 does not go with do_sample"):
        SamplingParams(num_beams=2, do_sample=True)
    with pytest.raises(UserError, match="num_beams 2 does not go with stop"):
        SamplingParams(num_beams=2, stop="x")


def test_one_stop_needs_no_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=5).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=5).stop_token_ids == (5,)
    assert SamplingParams(stop=None).stop == ()


def test_the_keys_of_a_yaml():
    config = tiny_config(
        do_sample=True,
        top_k=3,
        top_p=0.9,
        temperature=0.7,
        repetition_penalty=1.2,
        max_decode_length=40,
        max_new_tokens=9,
    )
    made = SamplingParams.from_model_config(config, top_k=7, temperature=None, seed=4)
    assert made == SamplingParams(
        do_sample=True,
        top_k=7,
        top_p=0.9,
        temperature=0.7,
        repetition_penalty=1.2,
        max_length=40,
        max_new_tokens=9,
        seed=4,
    )
    with pytest.raises(UserError, match="'topk' is no generation parameter"):
        SamplingParams.from_model_config(config, topk=3)
