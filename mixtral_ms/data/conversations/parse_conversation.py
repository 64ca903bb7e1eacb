"""Conversations out of rows as they are published: ShareGPT, OpenAI messages, Alpaca."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixtral_ms.data.conversations.alpaca_prompt import read_alpaca
from mixtral_ms.data.conversations.row_keys import check_message, check_row, is_learnt, system_of
from mixtral_ms.data.readers.row_log import UnfitRowError, listed_keys

_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_ROLES = {
    "system": _SYSTEM,
    "developer": _SYSTEM,
    "human": _USER,
    "user": _USER,
    "prompter": _USER,
    "gpt": _ASSISTANT,
    "chatgpt": _ASSISTANT,
    "assistant": _ASSISTANT,
    "model": _ASSISTANT,
    "bot": _ASSISTANT,
}
_NAMES = {_USER: "question", _ASSISTANT: "answer"}
_LISTS = ("conversations", "messages", "conversation")


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
        not_learnt: numbers of the rounds whose answers are only read.
    """

    rounds: list[Round]
    system: str | None = None
    shortened: str = ""
    not_learnt: frozenset[int] = frozenset()


class _Turn(NamedTuple):
    role: str
    text: str
    learnt: bool = True


def read_conversation(row: Any) -> Conversation:
    """The conversation of a row, whichever of the formats it has.

    Raises UnfitRowError, with the reason, for a row without a whole round, with an empty text, with
    roles that do not take turns, or with keys that say something else than its texts.
    """
    if not isinstance(row, dict):
        raise UnfitRowError(f"a {type(row).__name__}, not an object")
    lists = [key for key in _LISTS if row.get(key) is not None]
    if len(lists) > 1 and any(row[key] != row[lists[0]] for key in lists):
        raise UnfitRowError(f"it has {' and '.join(lists)}, which differ")
    if lists:
        turns, left_out = _turns(row[lists[0]])
    elif "instruction" in row or "output" in row:
        return read_alpaca_row(row)
    else:
        raise UnfitRowError(
            "neither conversations, nor messages, nor instruction and output; its keys: "
            f"{listed_keys(row)}"
        )
    return _conversation(row, turns, left_out)


def read_alpaca_row(row: Any) -> Conversation:
    """The conversation of a row with instruction, input and output, as `read_conversation`."""
    if not isinstance(row, dict):
        raise UnfitRowError(f"a {type(row).__name__}, not an object")
    try:
        prompt, output = read_alpaca(row)
    except ValueError as error:
        raise UnfitRowError(str(error)) from error
    return _conversation(row, [_Turn(_USER, prompt), _Turn(_ASSISTANT, output)], [])


def _turns(messages: Any) -> tuple[list[_Turn], list[str]]:
    """Role, text and whether it is learnt of each message; and what of them is left out."""
    if not isinstance(messages, list):
        raise UnfitRowError(f"its messages are a {type(messages).__name__}, not a list")
    turns: list[_Turn] = []
    left_out: list[str] = []
    for number, message in enumerate(messages):
        role, text_key = _role(message, number)
        left_out += check_message(message, number)
        text = _text(message.get(text_key), number, text_key)
        turns.append(_Turn(role, text, is_learnt(message, number)))
    return turns, left_out


def _role(message: Any, number: int) -> tuple[str, str]:
    """Who says a message, and the key of its text: "from" has "value", "role" has "content"."""
    holder: Mapping[str, Any] = message if isinstance(message, dict) else {}
    share_gpt, openai = holder.get("from"), holder.get("role")
    if share_gpt is None and openai is None:
        raise UnfitRowError(f"message {number} has no 'from' or 'role'")
    if share_gpt is not None and openai is not None:
        raise UnfitRowError(f"message {number} has both 'from' and 'role'")
    name, text_key = (share_gpt, "value") if openai is None else (openai, "content")
    role = None
    if isinstance(name, str):
        role = _ROLES.get(name) or _ROLES.get(name.strip().lower())
    if role is None:
        raise UnfitRowError(f"message {number} is from {name!r}; known are {', '.join(_ROLES)}")
    return role, text_key


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


def _conversation(row: Mapping[str, Any], turns: list[_Turn], left_out: list[str]) -> Conversation:
    """What a row's turns and its other keys say."""
    left_out = [*left_out, *check_row(row)]
    first = None
    if turns and turns[0].role == _SYSTEM:
        first = turns[0].text
        turns = turns[1:]
    system = system_of(row, first)
    if turns and turns[0].role == _ASSISTANT:
        turns = turns[1:]
        left_out.append("without a first answer that has no question")
    for number, turn in enumerate(turns):
        expected = (_USER, _ASSISTANT)[number % 2]
        if turn.role != expected:
            raise UnfitRowError(
                f"turn {number} is the {turn.role}'s, but should be the {expected}'s"
            )
    if len(turns) % 2:
        turns = turns[:-1]
        left_out.append("without a last question that has no answer")
    rounds, not_learnt = _rounds(turns)
    _check_unicode([system or "", *(turn.text for turn in turns)])
    return Conversation(rounds, system, " and ".join(left_out), not_learnt)


def _rounds(turns: list[_Turn]) -> tuple[list[Round], frozenset[int]]:
    """Questions with their answers, and of which rounds these are not learnt.

    Raises UnfitRowError when nothing can be learnt of them.
    """
    if not turns:
        raise UnfitRowError("no question with an answer")
    for number, turn in enumerate(turns):
        if not turn.text.strip():
            raise UnfitRowError(f"{_NAMES[turn.role]} {number // 2} is empty")
    answers = turns[1::2]
    not_learnt = frozenset(at for at, answer in enumerate(answers) if not answer.learnt)
    if len(not_learnt) == len(answers):
        raise UnfitRowError("none of its answers is to be learnt")
    rounds = [Round(q.text, a.text) for q, a in zip(turns[::2], answers, strict=True)]
    return rounds, not_learnt


def _check_unicode(texts: list[str]) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UnfitRowError("it holds a lone surrogate, no Unicode text") from error
