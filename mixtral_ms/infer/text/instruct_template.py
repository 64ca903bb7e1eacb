"""A conversation of messages as the prompt that its template makes of it."""

from collections.abc import Mapping, Sequence

from mixtral_ms.data.conversations.conversation_encoder import ConversationEncoder
from mixtral_ms.data.conversations.parse_conversation import Round
from mixtral_ms.data.readers.row_log import UnfitRowError
from mixtral_ms.errors import UserError

ROLES = ("system", "user", "assistant")


def encode_chat(encoder: ConversationEncoder, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation, for an answer to its last message.

    Every text is encoded literally, so that nothing a user writes becomes a control id.

    Args:
        encoder: of the template, with the tokenizer.
        messages: {"role": "system" | "user" | "assistant", "content": text}; after the system
            message user and assistant take turns, the user first and last.

    Raises:
        UserError: another order, an unknown role, an empty text, or a system message for which the
            template has no place.
    """
    system, turns = _split(messages)
    texts = [message["content"] for message in turns]
    rounds = [Round(*pair) for pair in zip(texts[:-1:2], texts[1::2], strict=True)]
    try:
        return encoder.prompt(rounds, system, texts[-1])
    except UnfitRowError as error:
        raise UserError(f"it cannot be asked so: {error}") from error


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
