"""Ids and masks against what sentencepiece says of each piece's place, and against upstream's way.

The oracle knows nothing of the code under test: it takes the text that fschat renders, cuts it at
the control literals it has itself put there, has sentencepiece report where each piece comes from,
and looks up in which message that lies.
"""

import functools
import json

import numpy as np
import pytest
import sentencepiece
from fastchat.conversation import get_conv_template
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.data.conversations.chat_template import load_template
from mixtral_ms.data.conversations.conversation_encoder import conversation_encoder
from mixtral_ms.data.conversations.parse_conversation import (
    Conversation,
    Round,
    UnfitRowError,
    read_conversation,
)
from mixtral_ms.data.conversations.sample_encoder import SampleEncoder
from mixtral_ms.data.conversations.show_sample import show_sample
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer

MODEL = str(find_example_tokenizer())
PIECES = sentencepiece.SentencePieceProcessor(model_file=MODEL)
BOS, EOS = 1, 2
SYSTEM = get_conv_template("vicuna_v1.1").system_message
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(str.strip)
CRAFTY = st.sampled_from(
    [
        "</s>",
        "<s>",
        "<unk>",
        " ASSISTANT: yes",
        "USER: no",
        "[INST] x [/INST]",
        "\u2581\u2581mark",
        "\n\n",
        "a  b ",
        " ",
        "\u4f60\u597d",
        "\U0001f600",
        "\U00020000\U00020001",
        "\x00",
        "e\u0301\u200b",
    ]
)
MESSAGE = st.lists(TEXT | CRAFTY, min_size=1, max_size=4).map("".join).filter(str.strip)
ROUNDS = st.lists(st.builds(Round, MESSAGE, MESSAGE), min_size=1, max_size=3)


@functools.cache
def encoder(name="vicuna", model=MODEL, backend="auto"):
    return conversation_encoder(Tokenizer(model, backend), name)


@functools.cache
def slow_encoder():
    """Takes the way of the models that change their text."""
    tokenizer = Tokenizer(MODEL)
    tokenizer.__dict__["splits_at_spaces"] = False
    return SampleEncoder(tokenizer, load_template("mistral"))


def oracle(conversation, user, assistant, system, first_only=False):
    """Ids and mask of a template whose rounds are `{user}q{assistant} a` + eos."""
    ids, mask = [BOS], [False]
    for number, (question, answer) in enumerate(conversation.rounds):
        asked = (system if number == 0 else "") + user + question + assistant
        places = PIECES.encode(f"{asked} {answer}", return_type="offset_mapping")
        ids += places["ids"]
        # a byte piece without a width belongs to the character that begins where it stands
        mask += [max(end, begin + 1) > len(asked) for begin, end in places["offsets"]]
        ids.append(EOS)
        mask.append(True)
    return ids, mask


def check(conversation, name="vicuna", backend="auto"):
    sample = encoder(name, backend=backend)(conversation)
    if name == "vicuna":
        system = conversation.system or SYSTEM
        ids, mask = oracle(conversation, "USER: ", " ASSISTANT:", f"{system} ")
    else:
        ids, mask = oracle(conversation, "[INST] ", " [/INST]", "")
    assert sample.ids.tolist() == ids
    assert sample.supervised.tolist() == mask
    assert sample.ids.dtype == np.int32
    return sample


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
@given(rounds=ROUNDS)
def test_ids_and_mask_are_the_oracles(name, rounds):
    check(Conversation(list(rounds)), name)


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
@given(rounds=ROUNDS)
def test_the_supervised_spans_decode_to_the_answers(name, rounds):
    sample = encoder(name)(Conversation(list(rounds)))
    spans, current = [], []
    for one, supervised in zip(sample.ids.tolist(), sample.supervised, strict=True):
        if supervised:
            current.append(one)
        if current and one == EOS:
            assert current.pop() == EOS
            spans.append(PIECES.decode(current))
            current = []
    # sentencepiece decodes a literal space mark as a space
    assert spans == [answer.replace("\u2581", " ") for _, answer in rounds]


@given(rounds=ROUNDS)
def test_control_ids_come_from_the_template_alone(rounds):
    ids = encoder()(Conversation(list(rounds))).ids
    assert (ids == BOS).sum() == 1 and ids[0] == BOS
    assert (ids == EOS).sum() == len(rounds) and ids[-1] == EOS
    assert not (ids == PIECES.unk_id()).any()


@pytest.mark.parametrize("backend", ["sentencepiece", "kitoken", "gigatoken"])
def test_backends_agree(backend):
    for question in ("</s> <unk>", "\U00020000 x", "a\n\n  b "):
        check(Conversation([Round(question, f"{question}!")] * 2), backend=backend)


def test_a_system_message_takes_the_default_ones_place():
    check(Conversation([Round("q", "a")], "You answer </s> briefly."))
    sample = encoder("mistral")(Conversation([Round("q", "a")], "S"))  # fschat has one line end
    assert PIECES.decode(sample.ids.tolist()) == "[INST] S\n\nq [/INST] a"


def test_a_system_message_without_a_place_is_refused():
    without = next(
        name for name in ("zero_shot", "metharme", "raw", "yuan")
        if load_template(name).system is None
    )  # fmt: skip
    with pytest.raises(UnfitRowError, match="no place"):
        encoder(without)(Conversation([Round("q", "a")], "S"))


@pytest.mark.parametrize("name", ["one_shot", "orca-2", "raw", "alpaca"])
def test_a_template_without_eos_gets_one_behind_each_answer(name):
    sample = encoder(name)(Conversation([Round("q", "first"), Round("r", "second")]))
    ends = np.flatnonzero(sample.ids == EOS)
    assert len(ends) == 2 and sample.supervised[ends].all()
    supervised = sample.ids[sample.supervised].tolist()
    assert PIECES.decode(supervised).replace(" ", "") == "firstsecond"


def test_zephyrs_eos_behind_a_question_is_not_supervised():
    sample = encoder("zephyr")(Conversation([Round("q", "first"), Round("r", "second")]))
    assert (sample.ids == EOS).sum() == 5  # system, two questions, two answers
    assert (sample.ids[sample.supervised] == EOS).sum() == 2
    assert PIECES.decode(sample.ids[sample.supervised].tolist()) == "firstsecond"


def upstream(conversation):
    """Ids and labels as llama_preprocess.py has them, for rows that it does not trip over."""
    rendered = get_conv_template("vicuna_v1.1")
    for question, answer in conversation.rounds:
        rendered.append_message("USER", question)
        rendered.append_message("ASSISTANT", answer)
    ids, labels = [BOS], [-100]
    for text in rendered.get_prompt().split("</s>")[:-1]:
        asked = len(PIECES.encode(text.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 1
        part = [*PIECES.encode(text), EOS]
        ids += part
        labels += [-100] * asked + part[asked:]
    return ids, labels


@pytest.mark.parametrize("file", ["alpaca_100.json", "alpaca_en_999.json"])
def test_real_rows_equal_the_oracle_and_upstream(request, file):
    path = request.config.getoption("--data") / "alpaca" / file
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    for row in json.loads(path.read_text(encoding="utf-8")):
        conversation = read_conversation(row)
        sample = check(conversation)
        ids, labels = upstream(conversation)
        assert sample.ids.tolist() == ids
        assert np.where(sample.supervised, sample.ids, -100).tolist() == labels


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A model that normalises, drops spaces and has no byte pieces: nothing is where it was."""
    folder = tmp_path_factory.mktemp("unigram")
    words = ["one", "two", "three", "USER:", "ASSISTANT:", "answer", "\uff21\uff22", "a  b", "chat"]
    lines = (f"{a} {b} {c}" for a in words for b in words for c in words)
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=60,
        model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return str(folder / "m.model")


def test_a_model_that_changes_its_text_is_masked_by_sentencepieces_own_places(unigram):
    assert not Tokenizer(unigram).splits_at_spaces
    conversation = Conversation([Round("one   two", "\uff21\uff22  answer  two")])
    sample = encoder(model=unigram)(conversation)
    pieces = sentencepiece.SentencePieceProcessor(model_file=unigram)
    assert pieces.decode(sample.ids[sample.supervised].tolist()) == "AB answer two"


@given(rounds=ROUNDS)
def test_both_ways_of_finding_the_ends_agree(rounds):
    samples = [one(Conversation(list(rounds))) for one in (encoder("mistral"), slow_encoder())]
    assert samples[0].ids.tolist() == samples[1].ids.tolist()
    assert samples[0].supervised.tolist() == samples[1].supervised.tolist()


@pytest.mark.parametrize("name", ["vicuna", "mistral", "zephyr"])
def test_an_answer_that_is_not_to_be_learnt_is_read_all_the_same(name):
    rounds = [Round("q", "bad"), Round("r", "good"), Round("s", "bad too")]
    all_learnt = encoder(name)(Conversation(rounds))
    one_learnt = encoder(name)(Conversation(rounds, not_learnt=frozenset({0, 2})))
    assert one_learnt.ids.tolist() == all_learnt.ids.tolist()
    assert PIECES.decode(one_learnt.ids[one_learnt.supervised].tolist()).strip() == "good"
    assert (one_learnt.ids[one_learnt.supervised] == EOS).sum() == 1


def test_show_marks_what_is_supervised():
    tokenizer = Tokenizer(MODEL)
    sample = encoder("mistral")(Conversation([Round("q </s>", "\U00020000 b"), Round("r", "c")]))
    plain = show_sample(sample, tokenizer, colour=False)
    assert plain == (
        "<s> [INST] q </s> [/INST]\u3010 \U00020000 b</s>\u3011 [INST] r [/INST]\u3010 c</s>\u3011"
    )
    forged = encoder("mistral")(Conversation([Round("\x1b[32mq", "a")]))
    assert show_sample(forged, tokenizer, colour=True).startswith(
        "<s> [INST] \\x1b[32mq [/INST]\x1b"
    )
    coloured = show_sample(sample, tokenizer, colour=True)
    assert "\x1b[32m c</s>\x1b[0m" in coloured
