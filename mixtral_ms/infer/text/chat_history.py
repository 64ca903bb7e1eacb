"""Chat history, which may grow longer than the context: what is kept, sent and saved."""

import json
from pathlib import Path

from mixtral_ms.data.conversations.conversation_encoder import ConversationEncoder
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.infer.text.instruct_template import encode_chat
from mixtral_ms.json_reader import read_json_object

Message = dict[str, str]


class ChatHistory:
    """Messages in turn, with an optional system text.

    Args:
        encoder: of the template, with the network's tokenizer.
    """

    def __init__(self, encoder: ConversationEncoder) -> None:
        self._encoder = encoder
        self.system = ""
        self.turns: list[tuple[str, str]] = []
        """Questions with their answers, oldest first."""

    @property
    def template(self) -> str:
        """The template's name."""
        return self._encoder.name

    @property
    def messages(self) -> list[Message]:
        """As {"role": "system" | "user" | "assistant", "content": text}."""
        return _messages(self.system, self.turns)

    def prompt_ids(self, question: str, room: int) -> tuple[list[int], int]:
        """Ids of the next question behind as many of the newest turns as fit.

        Args:
            question: what the user asks now.
            room: most ids; without any earlier turn it may become more.

        Returns:
            The ids, and how many of the oldest turns were left out.

        Raises:
            UserError: the question is empty or no Unicode text.
        """
        for dropped in range(len(self.turns) + 1):
            messages = _messages(self.system, self.turns[dropped:])
            messages.append({"role": "user", "content": question})
            ids = encode_chat(self._encoder, messages)
            if len(ids) <= room:
                break
        return ids, dropped

    def save(self, path: Path) -> None:
        """Write the conversation as JSON.

        Raises:
            UserError: there is such a file already, or it cannot be written.
        """
        if path.exists():
            raise UserError(f"{path} already exists: choose another name")
        try:
            with write_aside(path) as aside:
                text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
                aside.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Take a saved conversation instead of this one, which stays when that fails.

        Raises:
            UserError: the file cannot be read, or holds no conversation.
        """
        data = read_json_object(path)
        if "messages" not in data:
            raise UserError(f'{path} is no saved conversation: JSON with "messages"')
        messages = data["messages"]
        self.system, self.turns = _taken_apart(messages, path)


def _messages(system: str, turns: list[tuple[str, str]]) -> list[Message]:
    before = [{"role": "system", "content": system}] if system else []
    return before + [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _taken_apart(messages: object, path: Path) -> tuple[str, list[tuple[str, str]]]:
    wrong = UserError(
        f"{path} is no conversation of texts: an optional system message, then user and "
        "assistant in turn, ended by the assistant"
    )
    if not isinstance(messages, list):
        raise wrong
    roles: list[object] = []
    texts: list[str] = []
    for message in messages:
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str) or not text:
            raise wrong
        roles.append(message.get("role"))
        texts.append(text)
    system = ""
    if roles and roles[0] == "system":
        roles, system, texts = roles[1:], texts[0], texts[1:]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise wrong
    return system, list(zip(texts[::2], texts[1::2], strict=True))
