"""The chat format of Mixtral Instruct: `<s>[INST] question [/INST] answer</s>[INST] ...`."""

from collections.abc import Mapping, Sequence

from mixtral_ms.errors import UserError
from mixtral_ms.infer.text.detokenizer import TokenizerLike

ROLES = ("system", "user", "assistant")


def encode_chat(
    tokenizer: TokenizerLike, messages: Sequence[Mapping[str, str]], eos_id: int | None = None
) -> list[int]:
    """Ids of a conversation, for an answer to its last message.

    Every text is encoded literally and on its own, so that nothing a user writes becomes a
    control id. A system message comes first and is put before the first question.

    Args:
        tokenizer: encodes, and knows bos.
        messages: {"role": "system" | "user" | "assistant", "content": text}; after the system
            message user and assistant take turns, the user first and last.
        eos_id: what ends each answer; None takes the tokenizer's.

    Raises:
        UserError: another order, an unknown role or an empty text.

    Source: version 1 of mistral-common.
    """
    eos_id = tokenizer.eos_id if eos_id is None else eos_id
    system, turns = _split(messages)
    ids = [tokenizer.bos_id]
    for number, message in enumerate(turns):
        content = message["content"]
        if message["role"] == "assistant":
            ids += [*tokenizer.encode(content), eos_id]
            continue
        if number == 0 and system:
            content = f"{system}\n\n{content}"
        ids += tokenizer.encode(f"[INST] {content} [/INST]")
    return ids


def _split(messages: Sequence[Mapping[str, str]]) -> tuple[str, list[Mapping[str, str]]]:
    """The system text, and the turns after it."""
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"message {number}: role {role!r}: allowed are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"]:
            raise UserError(f"message {number} ({role}): its content must be a text, not empty")
    turns = list(messages)
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
    first = len(messages) - len(turns)
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise UserError(
                f"message {first + number} is of role {message['role']!r}, expected {expected!r}: "
                "after an optional system message, user and assistant take turns"
            )
    if len(turns) % 2 == 0:
        raise UserError("the last message must be the user's: there is nothing to answer")
    return system, turns
