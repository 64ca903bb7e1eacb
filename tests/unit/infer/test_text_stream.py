"""Text as it comes: whole characters, right spaces, stop strings found across tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.infer.text.detokenizer import TextStream

TOKENIZER = Tokenizer(find_example_tokenizer(), "sentencepiece")
TEXTS = [
    "Hello, world! It's 3.14.",
    "  two  spaces   and more ",
    "line\nline\r\n\n\ttab",
    "\u4f60\u597d, \U0001f600\U0001f469\u200d\U0001f467 \u0939\u093f\u0928 e\u0301",
    "a replacement \ufffd in the text",
    "x" * 200,
    "the quick brown fox jumps over the lazy dog " * 5,
]


def stream(prompt_ids, ids, stop=()):
    one = TextStream(TOKENIZER, prompt_ids, stop)
    pieces = [one.push(token) for token in ids]
    pieces.append(one.finish())
    assert "".join(pieces) == one.text
    return one, pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Say", "\u4f60", "x " * 40], ids=len)
def test_prompt_and_answer_read_as_one(prompt, text):
    prompt_ids = [1, *TOKENIZER.encode(prompt)]
    ids = TOKENIZER.encode(text)
    one, pieces = stream(prompt_ids, ids)
    both = TOKENIZER.decode([*prompt_ids, *ids])
    assert TOKENIZER.decode(prompt_ids) + one.text == both
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=80), st.integers(0, 20))
def test_any_ids_give_what_decode_gives(ids, prompt):
    one, _ = stream([1, *ids[:prompt]], ids[prompt:])
    whole = TOKENIZER.decode([1, *ids])
    before = TOKENIZER.decode([1, *ids[:prompt]])
    if before.endswith(SIGN):  # a character may have begun in the prompt
        assert whole.endswith(one.text)
    else:
        assert before + one.text == whole


SIGN = "\ufffd"
BYTES = {byte: 3 + byte for byte in range(256)}


@pytest.mark.parametrize("begun", [0, 1, 2, 3])
@pytest.mark.parametrize("prompt", ["abc" + SIGN, SIGN, SIGN * 5, "x" + SIGN + "y", "a " + SIGN])
@pytest.mark.parametrize(
    "answer", ["\U0001f9ff even", " even", SIGN, SIGN + SIGN + "z", "", "\u4f60"]
)
def test_a_sign_in_the_prompt_is_not_said_again(prompt, answer, begun):
    """Whatever follows it, and also where the prompt ends within the answer's first character."""
    ids = [BYTES[byte] for byte in answer.encode()]
    begun = min(begun, len(answer[:1].encode()) - 1) if answer else 0
    one, _ = stream([1, *TOKENIZER.encode(prompt), *ids[:begun]], ids[begun:])
    assert one.text == answer


def test_a_piece_of_its_own_for_the_sign():
    class OnePiece:
        bos_id, eos_id, vocab_size = 1, 2, 300

        def encode(self, text):
            return [299 if c == SIGN else ord(c) for c in text]

        def decode(self, ids):
            return "".join(SIGN if one == 299 else chr(one) for one in ids)

    one = TextStream(OnePiece(), OnePiece().encode("a" + SIGN))
    assert one.push(ord("b")) == "b"


@given(st.lists(st.sampled_from([*range(3, 259), 28705, 13, 2]), min_size=20, max_size=120))
def test_bytes_spaces_and_control_ids(ids):
    one, _ = stream([1, *TOKENIZER.encode("Go on")], ids)
    assert "Go on" + one.text == TOKENIZER.decode([1, *TOKENIZER.encode("Go on"), *ids])


@given(st.text(max_size=60), st.text(min_size=1, max_size=4), st.integers(0, 60))
def test_the_text_ends_before_a_stop_string(text, stop, at):
    text = text[:at] + stop + text[at:]
    ids = TOKENIZER.encode(text)
    full = TOKENIZER.decode(ids)
    one, pieces = stream([1], ids, (stop, "\x00never\x00"))
    expected = full.split(stop)[0]
    assert one.text == expected
    assert one.stopped == (stop in full)
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_stops_are_found_across_tokens_and_the_first_one_wins():
    ids = TOKENIZER.encode("one STOPPER two")
    one, pieces = stream([1], ids, ("PPER", "STOP"))
    assert (one.text, one.stopped) == ("one ", True)
    assert one.push(ids[0]) == ""


def test_what_might_have_been_a_stop_is_given_at_the_end():
    one, pieces = stream([1], TOKENIZER.encode("the last word STO"), ("STOP",))
    assert (one.text, one.stopped) == ("the last word STO", False)
    assert pieces[-1].endswith("STO")


def test_half_a_character_is_never_shown():
    ids = TOKENIZER.encode("\U0001f9ff")
    assert len(ids) > 4, "the test needs a character without a piece of its own"
    one = TextStream(TOKENIZER, [1])
    assert "".join(one.push(token) for token in ids[:-1]) == ""
    assert one.push(ids[-1]) == "\U0001f9ff"
    one = TextStream(TOKENIZER, [1])
    cut = "".join([one.push(token) for token in ids[:-1]] + [one.finish()])
    assert cut == TOKENIZER.decode(ids[:-1])


def test_ids_beyond_the_tokenizer_have_no_text():
    one, _ = stream([1], [TOKENIZER.vocab_size, *TOKENIZER.encode("ok")])
    assert one.text == "ok"


def test_a_step_costs_the_same_however_long_the_answer():
    seen = []

    class Counting:
        bos_id, eos_id, vocab_size = 1, 2, TOKENIZER.vocab_size

        def decode(self, ids):
            seen.append(len(ids))
            return TOKENIZER.decode(ids)

    one = TextStream(Counting(), [1])
    for token in np.random.default_rng(0).integers(300, 30000, 500).tolist():
        one.push(token)
    assert max(seen) < 64
