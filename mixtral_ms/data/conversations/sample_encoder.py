"""Conversations to ids, and which of the ids are supervised.

A token is supervised when it ends within what the model has to write: from the end of the prompt
it is given (`... ASSISTANT:`) to the end of the answer and the eos behind it. Its offset in
the text decides, found from the pieces' own lengths, never from counting the ids of parts encoded
anew.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_ms.data.conversations.chat_template import ChatTemplate
from mixtral_ms.data.conversations.parse_conversation import Conversation, Round
from mixtral_ms.data.readers.row_log import UnfitRowError
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.errors import UserError


class Sample(NamedTuple):
    """Ids int32 (tokens,), from bos on, and a bool for each: whether it is supervised."""

    ids: np.ndarray
    supervised: np.ndarray


class SampleEncoder:
    """Turns conversations into samples; answers that are not to be learnt are not supervised.

    Control ids come from the template alone: bos begins a sample, eos ends each answer, even with a
    template that has none there. What a template writes behind the last eos is left out. Text
    between two control ids is encoded in one piece, as MindFormers does it.

    Args:
        tokenizer: encodes.
        template: the texts around the messages.
        eos_id: what ends each answer; None takes the tokenizer's.

    Raises UserError for a tokenizer without bos or eos.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, eos_id: int | None = None
    ) -> None:
        if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise UserError(f"{tokenizer.model_file} has no bos or no eos, which answers end with")
        self._tokenizer, self._template = tokenizer, template
        self._eos_id = tokenizer.eos_id if eos_id is None else eos_id
        self._controls = {
            tokenizer.id_to_piece(one): one for one in (tokenizer.bos_id, tokenizer.eos_id)
        }
        self._split = re.compile(f"({'|'.join(map(re.escape, self._controls))})").split
        self._to_answer = self._parts(template.to_answer)
        self._lead = self._parts(template.lead)
        self._between = self._behind_answer(template.between)
        until_eos = self._behind_answer(template.closing)
        self._closing = until_eos[: until_eos.index(tokenizer.eos_id) + 1]
        before, after = template.system or ("", "")
        self._opening = self._parts(template.opening)
        self._system = (self._parts(before), self._parts(after))

    def __call__(self, conversation: Conversation) -> Sample:
        """Raises UnfitRowError for a system message that the template has no place for."""
        builder = _Builder(self._tokenizer)
        self._open(builder, conversation.system)
        last = len(conversation.rounds) - 1
        for number, (question, answer) in enumerate(conversation.rounds):
            builder.text(question)
            builder.add(self._to_answer)
            builder.supervise(number not in conversation.not_learnt)
            builder.add(self._lead)
            builder.text(answer)
            builder.add(self._closing if number == last else self._between)
        return self._finished(builder)

    def prompt(self, rounds: Sequence[Round], system: str, question: str) -> list[int]:
        """The ids from which the answer to `question` follows, behind earlier rounds.

        Raises UnfitRowError for a system message that the template has no place for.
        """
        builder = _Builder(self._tokenizer)
        self._open(builder, system)
        for asked, answer in rounds:
            builder.text(asked)
            builder.add([*self._to_answer, *self._lead])
            builder.text(answer)
            builder.add(self._between)
        builder.text(question)
        builder.add(self._to_answer)
        return self._finished(builder).ids.tolist()

    @property
    def name(self) -> str:
        """The template's."""
        return self._template.name

    @property
    def record(self) -> Mapping[str, Any]:
        """What to write down of the template."""
        return self._template.record

    def _finished(self, builder: "_Builder") -> Sample:
        sample = builder.sample()
        if self._eos_id != self._tokenizer.eos_id:
            sample.ids[sample.ids == self._tokenizer.eos_id] = self._eos_id
        return sample

    def _open(self, builder: "_Builder", system: str | None) -> None:
        if not system:
            builder.add(self._opening)
            return
        if self._template.system is None:
            raise UnfitRowError(
                f"a system message, for which template {self._template.name} has no place"
            )
        builder.add(self._system[0])
        builder.text(system)
        builder.add(self._system[1])

    def _parts(self, text: str) -> list[str | int]:
        """A template's text as plain text and control ids."""
        return [self._controls.get(part, part) for part in self._split(text) if part]

    def _behind_answer(self, text: str) -> list[str | int]:
        parts = self._parts(text)
        eos = self._tokenizer.eos_id
        return parts if eos in parts else [eos, *parts]


class _Builder:
    """Collects one sample: text until a control id comes, then the text's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._length = 0
        self._supervising = False
        self._since = -1
        self._spans: list[tuple[int, int]] = []
        self._ids: list[np.ndarray] = []
        self._supervised: list[np.ndarray] = []
        self._control(tokenizer.bos_id)

    def add(self, parts: list[str | int]) -> None:
        """Texts and control ids; an eos ends what is supervised."""
        for part in parts:
            if isinstance(part, str):
                self.text(part)
            elif part != self._tokenizer.bos_id or self._length or len(self._ids) > 1:
                self._control(part)

    def text(self, text: str) -> None:
        """Plain characters, whatever they spell."""
        self._texts.append(text)
        self._length += len(text)

    def supervise(self, on: bool) -> None:
        """From this offset on tokens are, or are not, supervised."""
        if on:
            # -1: the piece for the space that sentencepiece puts in front has no width.
            self._since = self._length or -1
        elif self._supervising:
            self._spans.append((self._since, self._length))
        self._supervising = on

    def sample(self) -> Sample:
        """What was collected."""
        self._encode_text()
        return Sample(np.concatenate(self._ids), np.concatenate(self._supervised))

    def _encode_text(self) -> None:
        """The text since the last control id, in one piece."""
        self.supervise(False)
        if self._length:
            ids, ends = self._tokenizer.encode_with_ends("".join(self._texts))
            supervised = np.zeros(len(ids), bool)
            for span in self._spans:
                first, behind = ends.searchsorted(span, "right")
                supervised[first:behind] = True
            self._ids.append(ids)
            self._supervised.append(supervised)
        self._texts, self._length, self._spans = [], 0, []

    def _control(self, one: int) -> None:
        supervising = self._supervising
        self._encode_text()
        self._ids.append(np.array([one], np.int32))
        self._supervised.append(np.array([supervising]))
        if supervising and one != self._tokenizer.eos_id:
            self.supervise(True)
