"""fschat's conversation templates, reduced to the constant texts between a conversation's messages.

A template is rendered once with one placeholder a message; what stands between the placeholders is
all there is to know of it. Rendering is then joining strings, and which text came from a message
and which from the template stays known: a `</s>` of the template is the id that ends an answer, a
`</s>` in a message is text. Templates that are more than constants (that number their rounds, or
change the messages) are told by rendering trial conversations both ways, and refused.
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mixtral_ms.data.conversations.parse_conversation import Conversation, Round
from mixtral_ms.errors import MissingDependencyError, UserError
from mixtral_ms.json_reader import JsonShape, require_shape

DEFAULT_TEMPLATE = "vicuna"
MISTRAL = "mistral"
"""Mixtral Instruct's own template, which the tokenizer's version decides."""
CHAT_TEMPLATE_KEY = "chat_template"
"""Of the template with which conversations became records, in what is written of them."""
_ALIASES = {"vicuna": "vicuna_v1.1"}
_MESSAGE, _SYSTEM = 0xE000, "\ue0ff"  # of Unicode's private use: in no template
_TRIALS = (
    [Round("a", "b")],
    [Round(" {x} </s>", "a\r\n\n\nb<n>"), Round("<s> USER: {}", "###\n "), Round("[INST]", "\n")],
)


@dataclass(frozen=True)
class ChatTemplate:
    """The constant texts of a template, in the order in which they come.

    Attributes:
        name: fschat's name.
        opening: before the first question, when the row has no system message.
        system: before and after a system message; None when the template knows none.
        to_answer: from a question to the end of what the model is given to answer.
        lead: between that and the answer; the model has to write it.
        between: from an answer to the next question.
        closing: after the last answer.
    """

    name: str
    opening: str
    system: tuple[str, str] | None
    to_answer: str
    lead: str
    between: str
    closing: str

    @property
    def record(self) -> dict[str, Any]:
        """What to write down of it, as JSON has it, for `template_of_record`."""
        return {**asdict(self), "system": None if self.system is None else list(self.system)}

    def render(self, conversation: Conversation) -> str:
        """The whole text, as fschat's get_prompt gives it.

        Raises ValueError for a system message for which the template has no place.
        """
        opening = self.opening
        if conversation.system:
            if self.system is None:
                raise ValueError(f"template {self.name} has no place for a system message")
            opening = conversation.system.join(self.system)
        parts = [opening]
        for question, answer in conversation.rounds:
            parts += (question, self.to_answer, self.lead, answer, self.between)
        parts[-1] = self.closing
        return "".join(parts)


_RECORD_SHAPE: JsonShape = {
    "name": str,
    "opening": str,
    "system": ([str], None),
    "to_answer": str,
    "lead": str,
    "between": str,
    "closing": str,
}


def template_of_record(record: object, where: str) -> str | ChatTemplate:
    """A template that was written down: all its texts, so that fschat is not asked for them again.

    Raises UserError, beginning with `where`, for what is none.
    """
    require_shape(record, {"name": str}, where)
    values: dict[str, Any] = dict(record) if isinstance(record, dict) else {}
    if values["name"] == MISTRAL:
        return MISTRAL
    require_shape(values, _RECORD_SHAPE, where)
    system = values["system"]
    if system is not None and len(system) != 2:
        raise UserError(f"{where}: 'system' must be null or two texts")
    known = {one.name: values[one.name] for one in fields(ChatTemplate)}
    return ChatTemplate(**{**known, "system": None if system is None else tuple(system)})


def load_template(name: str = DEFAULT_TEMPLATE) -> ChatTemplate:
    """A template of fschat by name; "vicuna" is vicuna_v1.1, MindFormers' own.

    Raises UserError without fschat, for an unknown name, and for a template that cannot be used.
    """
    known = _registered()
    real_name = _ALIASES.get(name, name)
    if real_name not in known:
        near = difflib.get_close_matches(name, [*known, *_ALIASES], n=3)
        raise UserError(
            f"--template (data_loader.template) {name!r} is not one of fschat's"
            f"{f'; did you mean {near[0]!r}?' if near else ''} "
            f"Usable ones: {', '.join([*_ALIASES, *usable_templates()])}"
        )
    template = _compile(real_name)
    if template is None:
        raise UserError(
            f"--template (data_loader.template) {name!r} cannot be used: it changes its "
            "messages' texts or differs from round to round; usable ones: "
            f"{', '.join([*_ALIASES, *usable_templates()])}"
        )
    return template


def usable_templates() -> list[str]:
    """Names of fschat's templates that `load_template` takes."""
    return [name for name in _registered() if _compile(name) is not None]


def _registered() -> dict[str, Any]:
    try:
        from fastchat.conversation import conv_templates  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingDependencyError("fschat", "finetune", "a conversation template") from error
    return conv_templates


def _compile(name: str) -> ChatTemplate | None:
    """The template reduced to its texts, None where that does not do it justice."""
    messages = [chr(_MESSAGE + number) for number in range(6)]
    try:
        texts = _split(_prompt(name, messages), messages)
    except ValueError:  # names a service and renders nothing
        return None
    if texts is None:
        return None
    opening, to_answer, between, *_, closing = texts
    asked = _prompt(name, [messages[0], None]).removeprefix(opening + messages[0])
    cut = len(asked) if to_answer.startswith(asked) else len(to_answer)
    template = ChatTemplate(
        name=name,
        opening=opening,
        system=_around_system(name, messages),
        to_answer=to_answer[:cut],
        lead=to_answer[cut:],
        between=between,
        closing=closing,
    )
    return template if _agrees(template) else None


def _around_system(name: str, messages: list[str]) -> tuple[str, str] | None:
    texts = _split(_prompt(name, messages, _SYSTEM), messages)
    before, found, after = texts[0].partition(_SYSTEM) if texts else ("", "", "")
    return (before, after) if found else None


def _agrees(template: ChatTemplate) -> bool:
    """Whether fschat renders the trial conversations as the reduced template does."""
    # some strip what begins or ends like a text of theirs, letter by letter
    letters = sorted(set(template.to_answer + template.lead + template.between + template.closing))
    own = [[Round(letter, letter)] for letter in letters]
    for rounds in (*_TRIALS, *own):
        for system in (None, *([" S {0}\n"] if template.system else [])):
            expected = _prompt(template.name, [one for pair in rounds for one in pair], system)
            if template.render(Conversation(list(rounds), system)) != expected:
                return False
    return True


def _split(prompt: str, messages: Sequence[str]) -> list[str] | None:
    """The texts around the messages; None unless each message is there once, in order."""
    texts = []
    for message in messages:
        text, found, prompt = prompt.partition(message)
        if not found:
            return None
        texts.append(text)
    return [*texts, prompt]


def _prompt(name: str, messages: Sequence[str | None], system: str | None = None) -> str:
    """What fschat renders for messages of user and assistant in turns."""
    conversation = _registered()[name].copy()
    if system is not None:
        conversation.set_system_message(system)
    for number, message in enumerate(messages):
        conversation.append_message(conversation.roles[number % 2], message)
    return conversation.get_prompt()
