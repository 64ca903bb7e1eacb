"""Reduced templates against fschat's own rendering."""

import json
import sys

import pytest
from fastchat.conversation import conv_templates, get_conv_template
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.data.conversations.chat_template import (
    load_template,
    template_of_record,
    usable_templates,
)
from mixtral_ms.data.conversations.parse_conversation import Conversation, Round
from mixtral_ms.errors import MissingDependencyError, UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def by_fschat(name, conversation):
    rendered = get_conv_template(name)
    if conversation.system:
        rendered.set_system_message(conversation.system)
    for question, answer in conversation.rounds:
        rendered.append_message(rendered.roles[0], question)
        rendered.append_message(rendered.roles[1], answer)
    return rendered.get_prompt()


@pytest.mark.parametrize("name", usable_templates())
@given(rounds=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.none() | TEXT)
def test_rendering_is_fschats(name, rounds, system):
    template = load_template(name)
    if template.system is None:
        system = None
    conversation = Conversation([Round(*one) for one in rounds], system)
    assert template.render(conversation) == by_fschat(name, conversation)


def test_most_templates_can_be_used_and_these_cannot():
    unusable = set(conv_templates) - set(usable_templates())
    # numbers its rounds; changes line ends; strips an answer's last letters, if they are n, < or >
    assert {"chatglm", "rwkv", "yuan2"} <= unusable
    assert len(unusable) < 12
    assert {"vicuna_v1.1", "mistral", "llama-2", "zephyr"} <= set(usable_templates())


def test_what_the_model_is_given_ends_where_fschat_ends_it():
    for name in ("vicuna_v1.1", "mistral", "zephyr", "one_shot"):
        asked = get_conv_template(name)
        asked.append_message(asked.roles[0], "q")
        asked.append_message(asked.roles[1], None)
        template = load_template(name)
        assert template.opening + "q" + template.to_answer == asked.get_prompt()


def test_a_system_message_without_a_place_is_refused():
    name = next(one for one in usable_templates() if load_template(one).system is None)
    with pytest.raises(ValueError, match="no place for a system message"):
        load_template(name).render(Conversation([Round("q", "a")], "be kind"))


def test_vicuna_is_the_default():
    assert load_template().name == load_template("vicuna").name == "vicuna_v1.1"


@pytest.mark.parametrize(
    "name, message", [("vicunna", "did you mean 'vicuna'"), ("chatglm", "cannot be used")]
)
def test_others_are_refused_with_the_usable_ones(name, message):
    with pytest.raises(UserError, match=f"{message}.*mistral"):
        load_template(name)


def test_without_fschat_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastchat.conversation", None)
    with pytest.raises(MissingDependencyError, match=r"fschat.*pip install"):
        load_template()


def test_what_is_written_down_is_the_template():
    for name in usable_templates():
        template = load_template(name)
        written = json.loads(json.dumps(template.record))
        assert template_of_record(written, "x") == template or name == "mistral"
    assert template_of_record({"name": "mistral"}, "x") == "mistral"


@pytest.mark.parametrize(
    "change, message",
    [
        ("vicuna", "state.json: a text, but must be an object"),
        ({"name": None}, "'name': null, but must be a text"),
        ({"lead": 3}, "'lead': a whole number, but must be a text"),
        ({"system": ["a"]}, "'system' must be null or two texts"),
        ({"system": [1, 2]}, "a whole number, but must be a text"),
    ],
)
def test_what_is_no_template_is_named(change, message):
    record = {**load_template().record, **change} if isinstance(change, dict) else change
    with pytest.raises(UserError) as error:
        template_of_record(record, "state.json")
    assert str(error.value).startswith("state.json: ") and message in str(error.value)
    with pytest.raises(UserError, match="lacks 'opening'"):
        template_of_record({"name": "vicuna_v1.1"}, "state.json")
