"""Rows of three formats to conversations, and why a row is not taken."""

import pytest

from mixtral_ms.data.conversations.alpaca_prompt import alpaca_prompt
from mixtral_ms.data.conversations.parse_conversation import Round, UnfitRowError, read_conversation

SHARE_GPT = {"human": "human", "gpt": "gpt", "system": "system"}


def share_gpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def openai(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_the_formats_mean_the_same():
    expected = [Round("q", "a"), Round("r", "b")]
    for row in (
        share_gpt(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")),
        openai(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")),
        openai(
            ("user", [{"type": "text", "text": "q"}]),
            ("assistant", "a"),
            ("user", [{"text": ""}, {"text": "r"}]),
            ("assistant", "b"),
        ),
    ):
        got = read_conversation(row)
        assert (got.rounds, got.system, got.shortened) == (expected, None, "")
    with_system = openai(("system", "S"), ("user", "q"), ("assistant", "a"))
    assert read_conversation(with_system).system == "S"


def test_alpaca_with_and_without_input():
    row = {"instruction": "Do.", "input": "", "output": "Done."}
    assert read_conversation(row).rounds == [
        Round(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nDo.\n\n### Response:",
            "Done.",
        )
    ]
    assert read_conversation({**row, "input": None}).rounds == read_conversation(row).rounds
    assert read_conversation({**row, "input": "X"}).rounds[0].question == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo.\n\n### Input:\nX\n\n### Response:"
    )
    assert alpaca_prompt("{input}", "{x}").count("{input}") == 1  # texts are no format strings


def test_turns_that_do_not_pair_up_are_dropped_and_said():
    got = read_conversation(share_gpt(("gpt", "0"), ("human", "q"), ("gpt", "a"), ("human", "r")))
    assert got.rounds == [Round("q", "a")]
    assert "first answer" in got.shortened and "last question" in got.shortened


@pytest.mark.parametrize(
    "row, reason",
    [
        ("text", "a str, not an object"),
        ({}, "neither conversations"),
        ({"prompt": 1, "completion": 2}, "'prompt', 'completion'"),
        ({"conversations": "x"}, "a str, not a list"),
        ({"conversations": []}, "no question with an answer"),
        (share_gpt(("human", "q")), "no question with an answer"),
        (share_gpt(("gpt", "a")), "no question with an answer"),
        (share_gpt(("human", "q"), ("gpt", "")), "answer 0 is empty"),
        (share_gpt(("human", "q"), ("gpt", " \n")), "answer 0 is empty"),
        (share_gpt(("human", ""), ("gpt", "a")), "question 0 is empty"),
        (share_gpt(("human", "q"), ("human", "r"), ("gpt", "a")), "turn 1 is the user's"),
        (share_gpt(("tool", "q")), "message 0 is from 'tool'"),
        (share_gpt(("human", 3), ("gpt", "a")), "message 0: its value is a int"),
        ({"messages": [{"content": "x"}]}, "message 0 has no 'role'"),
        (openai(("user", [{"image": "x"}]), ("assistant", "a")), "a part that is no text"),
        (openai(("user", "q"), ("assistant", None)), "answer 0 is empty"),
        ({"instruction": "x"}, "no output"),
        ({"output": "x"}, "no instruction"),
        ({"instruction": "x", "output": ""}, "no output"),
        ({"instruction": "x", "output": " "}, "white space only"),
        ({"instruction": "x", "output": 5}, "its output is a int"),
        (share_gpt(("human", "q\ud800"), ("gpt", "a")), "lone surrogate"),
    ],
)
def test_an_unfit_row_has_a_reason(row, reason):
    with pytest.raises(UnfitRowError, match=reason):
        read_conversation(row)
