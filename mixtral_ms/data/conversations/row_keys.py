"""Keys of a row, and of its messages, that say what to learn or what comes before.

They are honoured, or a reason to leave the row out, or said to be left out of it. Other keys (ids,
names, sources, scores) change nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mixtral_ms.data.readers.row_log import UnfitRowError

_LEARN = ("weight", "train", "training", "trainable", "loss")
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_CALLS = ("tool_calls", "function_call", "function_calls", "tool_call_id")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_UNWANTED = ("train", "training", "trainable", "label", "kto_tag")
_LEARN_KEYS = frozenset(_LEARN)
_MESSAGE_KEYS = frozenset((*_CALLS, *_MEDIA, *_THOUGHTS, "train_detail", "prefix"))
_ROW_KEYS = frozenset((*_MEDIA, *_UNWANTED, *_TOOLS, "history", "weight"))
_NOTHING = (None, "", "null", "[]", "{}", False)


def is_learnt(message: Mapping[str, Any], number: int) -> bool:
    """Whether a message that is an answer is to be learnt. Raises UnfitRowError for no yes or no.

    OpenAI and Mistral write weight 0 or 1, others train, training, trainable or loss.
    """
    if _LEARN_KEYS.isdisjoint(message):
        return True
    given = {key: message[key] for key in _LEARN if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise UnfitRowError(
                f"message {number}: its {key} is {value!r}, but 0 and 1 (false and true) are read"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise UnfitRowError(f"message {number}: {' and '.join(given)} say different things")
    return all(given.values())


def check_message(message: Mapping[str, Any], number: int) -> Iterator[str]:
    """What of a message is left out, in words. Raises UnfitRowError where its text is not all.

    An answer that calls a tool would else be learnt as one that ends where the call begins.
    """
    if _MESSAGE_KEYS.isdisjoint(message):  # as nearly all are
        return
    for key in (*_CALLS, *_MEDIA):
        if _is_there(message, key):
            raise UnfitRowError(f"message {number} has {key}, which no template here writes")
    if _is_there(message, "train_detail"):
        raise UnfitRowError(f"message {number} is to be learnt in parts (train_detail)")
    if message.get("prefix") is True:
        raise UnfitRowError(f"message {number} is the beginning of an answer only (prefix)")
    for key in _THOUGHTS:
        if _is_there(message, key):
            yield f"without the {key} of message {number}"


def check_row(row: Mapping[str, Any]) -> Iterator[str]:
    """What of a row is left out, in words. Raises UnfitRowError where it is not to be learnt."""
    if _ROW_KEYS.isdisjoint(row):
        return
    for key in _MEDIA:
        if _is_there(row, key):
            raise UnfitRowError(f"it has {key}, which no template here writes")
    if _is_there(row, "history"):
        raise UnfitRowError("it has a history before the instruction: write it as conversations")
    for key in _UNWANTED:
        if row.get(key) is False:
            raise UnfitRowError(f"its {key} is false: it is not to be learnt")
    weight = row.get("weight")
    if isinstance(weight, int | float) and weight == 0:
        raise UnfitRowError("its weight is 0: it is not to be learnt")
    if weight not in (None, 1):
        yield f"its weight {weight!r} is taken as 1"
    for key in _TOOLS:
        if _is_there(row, key):
            yield f"without its {key}, which no answer calls"


def system_of(row: Mapping[str, Any], first: str | None) -> str | None:
    """The system text of a row: of a key beside its messages, or its `first` message.

    Raises UnfitRowError for two that differ, and for one that is no text.
    """
    found = first or None
    for key in _SYSTEM:
        text = row.get(key)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UnfitRowError(f"its {key} is a {type(text).__name__}, not text")
        if found is not None and found != text:
            raise UnfitRowError(f"its {key} is another than its system message")
        found = text
    return found if found is not None else first


def _is_there(holder: Mapping[str, Any], key: str) -> bool:
    value = holder.get(key)
    if isinstance(value, str):
        value = value.strip()
    empty = isinstance(value, list | dict) and not value
    return not (empty or any(value is one or value == one for one in _NOTHING))
