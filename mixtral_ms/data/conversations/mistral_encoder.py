"""Mistral's instruct format, `[INST] question [/INST] answer</s>`, in training and in chats alike.

Source: versions 1, 2 and 3 of mistral-common. Version 1 (Mixtral 8x7B) writes the markers as text
and puts a system message in front of the first question; 2 and 3 (Mixtral 8x22B) have pieces for
them, and the system message stands in front of the last question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixtral_ms.data.conversations.chat_template import MISTRAL
from mixtral_ms.data.conversations.parse_conversation import Conversation, Round
from mixtral_ms.data.conversations.sample_encoder import Sample
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.errors import UserError

BEGIN_INST, _END_INST, _SYSTEM_PROMPT = "[INST]", "[/INST]", "[SYSTEM_PROMPT]"


class MistralEncoder:
    """Turns conversations into samples and prompts; each message is encoded on its own.

    So nothing that a message spells becomes a control id, or is joined with a marker.

    Args:
        tokenizer: its control pieces tell the version.
        eos_id: what ends each answer; None takes the tokenizer's.

    Raises UserError for a tokenizer without bos or eos, and for one of another version.
    """

    name = MISTRAL
    record: Mapping[str, Any] = {"name": MISTRAL}

    def __init__(self, tokenizer: Tokenizer, eos_id: int | None = None) -> None:
        if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise UserError(f"{tokenizer.model_file} has no bos or no eos, which answers end with")
        self._tokenizer = tokenizer
        ids = (tokenizer.bos_id, tokenizer.eos_id if eos_id is None else eos_id)
        self._bos, self._eos = (np.array([one], np.int32) for one in ids)
        found = map(tokenizer.control_id, (BEGIN_INST, _END_INST))
        self._markers = [np.array([one], np.int32) for one in found if one is not None]
        if tokenizer.control_id(_SYSTEM_PROMPT) is not None or len(self._markers) == 1:
            raise UserError(
                f"{tokenizer.model_file} is of a version after 3, whose conversations are written "
                "in another way than Mixtral's; give the tokenizer.model of the model's weights"
            )

    def __call__(self, conversation: Conversation) -> Sample:
        """The ids of a conversation with all its answers, and which of them are supervised."""
        rounds, system = conversation.rounds, conversation.system or ""
        parts, supervised = [self._bos], [False]
        for number, (question, answer) in enumerate(rounds):
            asked = self._question(question, system, number, len(rounds))
            parts += (*asked, self._answer(answer), self._eos)
            learnt = number not in conversation.not_learnt
            supervised += (*[False] * len(asked), learnt, learnt)
        return Sample(np.concatenate(parts), np.repeat(supervised, list(map(len, parts))))

    def prompt(self, rounds: Sequence[Round], system: str, question: str) -> list[int]:
        """The ids from which the answer to `question` follows, behind earlier rounds."""
        count = len(rounds) + 1
        parts = [self._bos]
        for number, (asked, answer) in enumerate(rounds):
            parts += (
                *self._question(asked, system, number, count),
                self._answer(answer),
                self._eos,
            )
        parts += self._question(question, system, count - 1, count)
        return np.concatenate(parts).tolist()

    def _question(self, text: str, system: str, number: int, count: int) -> list[np.ndarray]:
        """The ids of one of so many questions, one of which has the system message."""
        has_pieces = bool(self._markers)
        if system and number == (count - 1 if has_pieces else 0):
            text = f"{system}\n\n{text}"
        if not has_pieces:
            return [self._tokenizer.encode_array(f"{BEGIN_INST} {text} {_END_INST}")]
        begin, end = self._markers
        return [begin, self._tokenizer.encode_array(text), end]

    def _answer(self, text: str) -> np.ndarray:
        """Versions 2 and 3 write no spaces at an answer's end."""
        return self._tokenizer.encode_array(text.rstrip(" ") if self._markers else text)
