"""Conversations out of rows as they are published: ShareGPT, OpenAI messages, Alpaca."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mixtral_ms.data.conversations.alpaca_prompt import read_alpaca
from mixtral_ms.data.readers.row_log import UnfitRowError

_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_ROLES = {
    "system": _SYSTEM,
    "human": _USER,
    "user": _USER,
    "gpt": _ASSISTANT,
    "assistant": _ASSISTANT,
}
_NAMES = {_USER: "question", _ASSISTANT: "answer"}


class Round(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass
class Conversation:
    """What one row says.

    Attributes:
        rounds: at least one.
        system: the system message; None leaves it to the template.
        shortened: what of the row is not in `rounds`, in words; empty when all is.
    """

    rounds: list[Round]
    system: str | None = None
    shortened: str = ""


def read_conversation(row: Any) -> Conversation:
    """The conversation of a row, whichever of the formats it has.

    Raises UnfitRowError, with the reason, for a row without a whole round, with an empty text, or
    with roles that do not take turns.
    """
    if not isinstance(row, dict):
        raise UnfitRowError(f"a {type(row).__name__}, not an object")
    if row.get("conversations") is not None:
        turns = _turns(row["conversations"], "from", "value")
    elif row.get("messages") is not None:
        turns = _turns(row["messages"], "role", "content")
    elif "instruction" in row or "output" in row:
        turns = _alpaca_turns(row)
    else:
        keys = ", ".join(map(repr, row)) or "none"
        raise UnfitRowError(
            f"neither conversations, nor messages, nor instruction and output; its keys: {keys}"
        )
    return _conversation(turns)


def _alpaca_turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        prompt, output = read_alpaca(row)
    except ValueError as error:
        raise UnfitRowError(str(error)) from error
    return [(_USER, prompt), (_ASSISTANT, output)]


def _turns(messages: Any, role_key: str, text_key: str) -> list[tuple[str, str]]:
    """Role and text of each message."""
    if not isinstance(messages, list):
        raise UnfitRowError(f"its messages are a {type(messages).__name__}, not a list")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or role_key not in message:
            raise UnfitRowError(f"message {number} has no {role_key!r}")
        role = _ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            raise UnfitRowError(
                f"message {number} is from {message[role_key]!r}; known are {', '.join(_ROLES)}"
            )
        turns.append((role, _text(message.get(text_key), number, text_key)))
    return turns


def _text(value: Any, number: int, key: str) -> str:
    """A message's text; OpenAI's may come in parts."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise UnfitRowError(f"message {number} has a part that is no text")
        return "".join(texts)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnfitRowError(f"message {number}: its {key} is a {type(value).__name__}, not text")
    return value


def _conversation(turns: list[tuple[str, str]]) -> Conversation:
    system = None
    if turns and turns[0][0] == _SYSTEM:
        system = turns[0][1]
        turns = turns[1:]
    shortened = []
    if turns and turns[0][0] == _ASSISTANT:
        turns = turns[1:]
        shortened.append("without a first answer that has no question")
    for number, (role, _) in enumerate(turns):
        expected = (_USER, _ASSISTANT)[number % 2]
        if role != expected:
            raise UnfitRowError(f"turn {number} is the {role}'s, but should be the {expected}'s")
    if len(turns) % 2:
        turns = turns[:-1]
        shortened.append("without a last question that has no answer")
    if not turns:
        raise UnfitRowError("no question with an answer")
    for number, (role, text) in enumerate(turns):
        if not text.strip():
            raise UnfitRowError(f"{_NAMES[role]} {number // 2} is empty")
    _check_unicode([system or "", *(text for _, text in turns)])
    rounds = [Round(q[1], a[1]) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return Conversation(rounds, system, " and ".join(shortened))


def _check_unicode(texts: list[str]) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UnfitRowError("it holds a lone surrogate, no Unicode text") from error
