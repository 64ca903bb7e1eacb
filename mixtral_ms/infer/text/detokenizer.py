"""Tokens to text as they come: whole characters, right spaces, stop strings cut off."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"
_HELD_CHARACTERS = 3  # a character of four bytes shows as up to three of these before it is whole
_WINDOW = 16


class TokenizerLike(Protocol):
    """What the engine asks of a tokenizer; `data.tokenizer.Tokenizer` is one."""

    @property
    def bos_id(self) -> int:
        """Id that begins a document, -1 when there is none."""

    @property
    def eos_id(self) -> int:
        """Id that ends a document, -1 when there is none."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control ids give nothing."""


class TextStream:
    """The text of an answer, token by token.

    The first tokens are decoded behind the prompt's last ones, so that prompt + text reads as if
    it had been decoded at once.

    Args:
        tokenizer: decodes.
        prompt_ids: what the answer follows.
        stop: the text ends before the first of these.
    """

    def __init__(
        self, tokenizer: TokenizerLike, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = self._known(prompt_ids[-_WINDOW:])
        self._boundary = len(self._ids)
        self._decoded = len(self._tokenizer.decode(self._ids[: self._whole_ids()]))
        self._held = ""
        self.text = ""
        """All that was returned so far."""
        self.stopped = False
        """Whether a stop string was found; nothing more is returned then."""

    def push(self, token_id: int) -> str:
        """The text that can be shown now that this token has come."""
        self._ids += self._known([token_id])
        text = self._decode()
        whole = _whole(text)
        # Never back: of a prompt that ends in this character, it is not part of the answer.
        new, self._decoded = whole[self._decoded :], max(self._decoded, len(whole))
        if len(whole) == len(text):
            self._move_window()
        return self._release(new)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        shown = self._release(self._decode()[self._decoded :])
        held, self._held = self._held, ""
        self.text += held
        return shown + held

    def _whole_ids(self) -> int:
        """How many of the ids before the answer are whole characters: a prompt may begin one."""
        least = max(0, len(self._ids) - _HELD_CHARACTERS)
        for count in range(len(self._ids), least, -1):
            ids = self._ids[:count]
            if not self._tokenizer.decode(ids).endswith(_INCOMPLETE) or self._writes_sign(ids):
                return count
        return least

    def _writes_sign(self, ids: list[int]) -> bool:
        """Whether the sign for what is incomplete stands there as a character of its own."""
        before = self._tokenizer.encode("a")
        sign = self._tokenizer.encode("a" + _INCOMPLETE)[len(before) :]
        return ids[-len(sign) :] == sign

    def _known(self, ids: Sequence[int]) -> list[int]:
        # The network's vocabulary may be padded beyond the tokenizer's.
        return [one for one in ids if one < self._tokenizer.vocab_size]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids) if self._ids else ""

    def _move_window(self) -> None:
        """Forget old tokens, so that a step's cost does not grow; only between characters."""
        if len(self._ids) - self._boundary < _WINDOW:
            return
        text = self._tokenizer.decode(self._ids[self._boundary :])
        # A window without text would let the tokenizer drop the next word's space.
        if text:
            self._ids = self._ids[self._boundary :]
            self._decoded = len(text)
        self._boundary = len(self._ids)

    def _release(self, new: str) -> str:
        """Add text; returns what cannot be part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, keep, self._held = True, min(found), ""
        else:
            keep = len(text) - max((_overlap(text, one) for one in self._stop), default=0)
            self._held = text[keep:]
        self.text += text[:keep]
        return text[:keep]


def _whole(text: str) -> str:
    """Without a last character that may still be incomplete."""
    stripped = text.rstrip(_INCOMPLETE)
    return text[: max(len(stripped), len(text) - _HELD_CHARACTERS)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
