"""Rows of three formats to conversations, and why a row is not taken."""

import pytest

from mixtral_ms.data.conversations.alpaca_prompt import alpaca_prompt
from mixtral_ms.data.conversations.parse_conversation import Round, UnfitRowError, read_conversation
from mixtral_ms.data.readers.row_log import RowLog

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
        (share_gpt((3, "q")), "message 0 is from 3"),
        (share_gpt(("human", 3), ("gpt", "a")), "message 0: its value is a int"),
        ({"messages": [{"content": "x"}]}, "message 0 has no 'from' or 'role'"),
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


QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TWICE = [*QA, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]


def with_answer(**keys):
    return {"messages": [TWICE[0], {**TWICE[1], **keys}, *TWICE[2:]]}


# What the row says beside its texts: (rounds not learnt, system, words of `shortened`) or a reason.
KEYS = {
    "weight 0": (with_answer(weight=0), ({0}, None, "")),
    "weight 0.0": (with_answer(weight=0.0), ({0}, None, "")),
    "weight 1": (with_answer(weight=1), (set(), None, "")),
    "weight null": (with_answer(weight=None), (set(), None, "")),
    "train false": (with_answer(train=False), ({0}, None, "")),
    "training false": (with_answer(training=False), ({0}, None, "")),
    "loss false": (with_answer(loss=False), ({0}, None, "")),
    "weight 0.5": (with_answer(weight=0.5), "message 1: its weight is 0.5"),
    "weight of text": (with_answer(weight="0"), "message 1: its weight is '0'"),
    "weight not a number": (with_answer(weight=float("nan")), "message 1: its weight is nan"),
    "weight against train": (with_answer(weight=1, train=False), "say different things"),
    "no answer learnt": ({"messages": [QA[0], {**QA[1], "weight": 0}]}, "none of its answers"),
    "a question's weight": ({"messages": [{**QA[0], "weight": 0}, QA[1]]}, (set(), None, "")),
    "in parts": (with_answer(train_detail=[{"begin_offset": 0}]), "learnt in parts"),
    "a call": (with_answer(tool_calls=[{"id": 1}]), "message 1 has tool_calls"),
    "an old call": (with_answer(function_call={"name": "f"}), "message 1 has function_call"),
    "no call": (with_answer(tool_calls=None, function_call={}, name="x"), (set(), None, "")),
    "an empty call": (with_answer(tool_calls=[]), (set(), None, "")),
    "a call and no text": (with_answer(tool_calls=[{}], content=None), "message 1 has tool_calls"),
    "a picture": (with_answer(images=["a.png"]), "message 1 has images"),
    "thoughts": (
        with_answer(reasoning_content="hm"),
        (set(), None, "without the reasoning"),
    ),
    "a beginning": (with_answer(prefix=True), "beginning of an answer"),
    "tools": (
        {"messages": QA, "tools": [{"type": "function"}]},
        (set(), None, "without its tools"),
    ),
    "tools as text": ({"messages": QA, "tools": "[]"}, (set(), None, "")),
    "no tools": ({"messages": QA, "tools": None}, (set(), None, "")),
    "pictures": ({"messages": QA, "images": ["a.png"]}, "it has images"),
    "system": ({"conversations": QA, "system": "S"}, (set(), "S", "")),
    "system_prompt": ({"messages": QA, "system_prompt": "S"}, (set(), "S", "")),
    "no system": ({"messages": QA, "system": ""}, (set(), None, "")),
    "the same system": (
        {"messages": [{"role": "system", "content": "S"}, *QA], "system": "S"},
        (set(), "S", ""),
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "S"}, *QA], "system": "T"},
        "another than",
    ),
    "a system of numbers": ({"messages": QA, "system": 3}, "its system is a int"),
    "alpaca, system": ({"instruction": "i", "output": "o", "system": "S"}, (set(), "S", "")),
    "alpaca, history": ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "a history"),
    "alpaca, no history": ({"instruction": "i", "output": "o", "history": []}, (set(), None, "")),
    "not wanted": ({"messages": QA, "label": False}, "its label is false"),
    "a label": ({"messages": QA, "label": "good"}, (set(), None, "")),
    "a row not to train": ({"messages": QA, "train": False}, "its train is false"),
    "a row's weight 0": ({"messages": QA, "weight": 0}, "its weight is 0"),
    "a row's weight": (
        {"messages": QA, "weight": 2.5},
        (set(), None, "weight 2.5 is taken as 1"),
    ),
    "further keys": ({"messages": QA, "id": 3, "source": "x", "score": 0}, (set(), None, "")),
    "two lists": ({"messages": QA, "conversations": TWICE}, "conversations and messages, which"),
    "two equal lists": ({"messages": QA, "conversations": QA}, (set(), None, "")),
    "both spellings": ({"messages": [{"from": "user", **QA[0]}, QA[1]]}, "both 'from' and 'role'"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_are_honoured_or_the_row_is_named(case):
    row, expected = KEYS[case]
    if isinstance(expected, str):
        with pytest.raises(UnfitRowError, match=expected):
            read_conversation(row)
        return
    got = read_conversation(row)
    not_learnt, system, shortened = expected
    assert (got.not_learnt, got.system) == (not_learnt, system)
    assert shortened in got.shortened and bool(shortened) == bool(got.shortened)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": QA},
        {"conversation": QA},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]},
        {"messages": [{"role": "USER", "content": "q"}, {"role": " Assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"role": "model", "content": "a"}]},
        {"messages": [{"from": None, "value": None, **QA[0]}, QA[1]]},  # as Parquet fills them up
    ],
)
def test_spellings_of_the_same(row):
    assert read_conversation(row).rounds == [Round("q", "a")]


def test_what_is_large_is_named_in_few_words(tmp_path):
    log = RowLog()
    for row in (
        {f"key {number}": 0 for number in range(5000)},
        {"k" * 100_000: 1},
        {"messages": [{"role": "r" * 100_000, "content": "x"}]},
        {"messages": [{**QA[0]}, {**QA[1], "weight": "w" * 100_000}]},
    ):
        with pytest.raises(UnfitRowError) as error:
            read_conversation(row)
        log.add(tmp_path / "a\nb.jsonl", 0, "left out", str(error.value))
    assert max(map(len, log.first)) < 600 and "and 4988 more" in log.first[0]
    assert all("a\\nb.jsonl" in one and "\n" not in one for one in log.first)
