import gzip
import json
import os
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_ms.data.tokenizer import tokenizer as tokenizer_module
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.data.tokenizer.sentencepiece_model import is_plain_bpe
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer, split_at_spaces
from mixtral_ms.errors import UserError

SHARED = Path(os.environ.get("MIXTRAL_MS_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
MODEL = find_example_tokenizer()
FAST = Tokenizer(MODEL)
BULK = Tokenizer(MODEL, bulk=True)
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
LITERALS = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "\u2581\u2581", "[INST]", "\r\n", "\x00"]


def assert_same_ids(texts):
    count = 0
    for text in texts:
        expected = REFERENCE.encode(text)
        assert FAST.encode(text) == expected, ascii(text[:200])
        assert BULK.encode(text) == expected, ascii(text[:200])
        count += 1
    assert count


def shared_texts(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        content = file.read()
    if ".json" in path.name:
        yield from _strings([json.loads(line) for line in content.splitlines() if line.strip()])
    yield from content.split("\n \n")


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


@pytest.mark.parametrize(
    "name",
    [
        "wikitext-2/wiki.valid.tokens",
        "web/c4_300.jsonl",
        "eval/gsm8k_test.jsonl",
        "eval/HumanEval.jsonl.gz",
        "eval/math_400.jsonl",
    ],
)
def test_equals_sentencepiece_on_real_data(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"no {path} on this machine (set MIXTRAL_MS_TEST_DATA)")
    assert_same_ids(shared_texts(path))


def test_equals_sentencepiece_on_the_standard_library_texts():
    assert_same_ids(topics.topics.values())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
            st.sampled_from(LITERALS),
            st.text(" \n\ta=\u2581", max_size=20),
        )
    ).map("".join)
)
def test_equals_sentencepiece_on_random_unicode(text):
    ids = REFERENCE.encode(text)
    assert FAST.encode(text) == BULK.encode(text) == ids
    for tokenizer in (FAST, BULK):
        array = tokenizer.encode_array(text)
        assert array.dtype == np.int32
        assert array.tolist() == ids
    assert FAST.decode(ids) == REFERENCE.decode(ids)


def test_the_fast_paths_are_really_taken():
    assert FAST.backend == "kitoken"
    assert BULK.backend == "gigatoken"


def test_golden_ids_and_special_ids():
    assert FAST.encode("Hello, world!") == [22557, 28725, 1526, 28808]
    assert (FAST.vocab_size, FAST.bos_id, FAST.eos_id, FAST.unk_id, FAST.pad_id) == (
        *(32000, 1, 2, 0),
        -1,
    )
    assert FAST.fingerprint == "37974873eb68a7ab30c4912fc36264ae"  # MD5 of Mixtral's
    assert FAST.id_to_piece(2) == "</s>"


@pytest.mark.parametrize("backend", ["kitoken", "gigatoken", "sentencepiece"])
@pytest.mark.parametrize("literal", ["<s>", "</s>", "<unk>"])
def test_control_literals_in_text_are_text(backend, literal):
    tokenizer = Tokenizer(MODEL, backend)
    ids = tokenizer.encode(f"a {literal} b")
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode(ids) == f"a {literal} b"


def test_control_ids_decode_to_nothing():
    assert FAST.decode([1, *FAST.encode("a b"), 2]) == "a b"


def test_id_outside_the_model_is_an_error():
    with pytest.raises(UserError, match=r"id 32000 .*32000"):
        FAST.decode([32000])


@pytest.mark.parametrize("backend", ["kitoken", "gigatoken", "sentencepiece"])
def test_lone_surrogate_is_named(backend):
    with pytest.raises(UserError, match=r"\\ud800.* at character 2"):
        Tokenizer(MODEL, backend).encode("ab\ud800")


def test_falls_back_when_kitoken_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kitoken", None)
    assert Tokenizer(MODEL).backend == "sentencepiece"
    assert Tokenizer(MODEL).encode("Hello") == REFERENCE.encode("Hello")
    with pytest.raises(UserError, match="pip install kitoken"):
        Tokenizer(MODEL, "kitoken")


def test_falls_back_when_gigatoken_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert Tokenizer(MODEL, bulk=True).backend == "kitoken"
    with pytest.raises(UserError, match="pip install gigatoken"):
        Tokenizer(MODEL, "gigatoken")


@pytest.mark.slow
def test_gigatoken_starts_afresh_and_keeps_its_ids(monkeypatch):
    monkeypatch.setattr("mixtral_ms.data.tokenizer.fast_encoders._FRESH_START", 30)
    tokenizer = Tokenizer(MODEL, "gigatoken")
    for text in ("some words here", "and some more words", "and again") * 2:
        assert tokenizer.encode(text) == REFERENCE.encode(text)


def test_falls_back_when_the_self_check_fails(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "load_kitoken", lambda model: lambda text: [3])
    assert Tokenizer(MODEL).backend == "sentencepiece"
    with pytest.raises(UserError, match="ids differ"):
        Tokenizer(MODEL, "kitoken")


@pytest.fixture(scope="module")
def unigram_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unigram")
    text = folder / "text.txt"
    text.write_text("\n".join(list(topics.topics.values())[0].split("\n") * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "m"), vocab_size=150, minloglevel=2
    )
    return folder / "m.model"


def test_a_model_of_another_kind_uses_sentencepiece(unigram_model):
    tokenizer = Tokenizer(unigram_model)
    assert tokenizer.backend == "sentencepiece"
    assert not tokenizer.splits_at_spaces
    reference = sentencepiece.SentencePieceProcessor(model_file=str(unigram_model))
    assert tokenizer.encode("The  quick fox") == reference.encode("The  quick fox")


def test_plain_bpe_is_recognized_and_damage_is_not():
    data = MODEL.read_bytes()
    assert is_plain_bpe(data)
    assert not is_plain_bpe(data[: len(data) // 2])
    assert not is_plain_bpe(b"\xff" * 50)
    assert not is_plain_bpe(b"\x10\x05" + data)  # a number where the trainer's settings belong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the tokenizer model .*: no such file"),
        (b"", r"is empty \(0 bytes\), not a sentencepiece model"),
        (b"hello", r"not a sentencepiece model \(5 bytes\); give the tokenizer.model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b'{"version": "1.0", "model": {}}', "JSON, as Hugging Face's tokenizer.json"),
        (MODEL.read_bytes().replace(b"\xe2\x96\x81the", b"\xff\x96\x81the", 1), "is not UTF-8"),
        (MODEL.read_bytes()[:100_000], "not a sentencepiece model"),
    ],
    ids=["absent", "empty", "text", "git-lfs", "page", "JSON", "a piece", "cut off"],
)
def test_bad_model_file_is_a_user_error(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(path)


def test_unknown_backend_is_a_user_error():
    with pytest.raises(UserError, match="'fast'"):
        Tokenizer(MODEL, "fast")


def test_missing_example_tokenizer_names_the_pip_command(monkeypatch):
    monkeypatch.setattr("mixtral_ms.data.tokenizer.example_tokenizer.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mistral-common"):
        find_example_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\u2581\u00e9<s>", max_size=60), st.integers(1, 20))
def test_parts_cut_at_spaces_encode_like_the_whole(text, limit):
    parts = list(split_at_spaces(text, limit))
    assert " ".join(parts) == text
    assert sum((FAST.encode(part) for part in parts), []) == FAST.encode(text)


def test_a_text_is_really_cut():
    assert list(split_at_spaces("one two three", 3)) == ["one", "two", "three"]
