"""Encoders from optional libraries that are faster than sentencepiece with the same ids.

Each is used only for models of the kind for which it was proven equal, and after a self-check.
"""

from collections.abc import Callable, Sequence

import numpy as np

Encoder = Callable[[str], list[int] | np.ndarray]

# The library remembers every word it meets. Starting afresh after so many characters bounds that:
# random words, the worst case, then take half a gigabyte, English far less.
_FRESH_START = 64 << 20


class GigatokenEncoder:
    """gigatoken's encoder: the fastest on long inputs, slow to load.

    It takes the names of control ids in a text for the ids themselves. Such texts are given to the
    `exact` encoder instead.
    """

    def __init__(self, model: bytes, control_pieces: Sequence[str], exact: Encoder) -> None:
        self._model = model
        self._control_pieces = tuple(control_pieces)
        # A character that all of them have: looking for it alone is faster, and few texts have it.
        common = set.intersection(*map(set, self._control_pieces)) if control_pieces else set()
        self._hint = min(common, default="")
        self._exact = exact
        self._load()

    def __call__(self, text: str) -> list[int] | np.ndarray:
        """Ids of a text."""
        if self._hint in text and any(piece in text for piece in self._control_pieces):
            return self._exact(text)
        self._encoded += len(text)
        if self._encoded > _FRESH_START:
            self._load()
        return self._encode(text)

    def _load(self) -> None:
        from gigatoken import Tokenizer  # noqa: PLC0415 - optional

        self._encode = Tokenizer.from_sentencepiece(self._model).backend.encode
        self._encoded = 0


def load_kitoken(model: bytes) -> Encoder:
    """kitoken's encoder. Raises ImportError when it is absent, others for models it cannot load."""
    import kitoken  # noqa: PLC0415 - optional

    return kitoken.Kitoken.from_sentencepiece(model).encode
