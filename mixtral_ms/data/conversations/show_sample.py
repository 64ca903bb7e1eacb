"""Samples as text in which one sees what is supervised."""

from itertools import groupby

import numpy as np

from mixtral_ms.data.conversations.sample_encoder import Sample
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_SPACE_MARK = "\u2581"


def show_sample(sample: Sample, tokenizer: Tokenizer, *, colour: bool) -> str:
    """A sample decoded, control ids by name; the supervised part green, or between 【 and 】."""
    before, after = (_GREEN, _PLAIN) if colour else ("\u3010", "\u3011")
    parts = []
    for supervised, group in groupby(zip(sample.supervised, sample.ids, strict=True), _first):
        text = _text([one for _, one in group], tokenizer)
        parts.append(f"{before}{text}{after}" if supervised else text)
    return "".join(parts)


def _first(pair: tuple[np.bool_, np.int32]) -> bool:
    return bool(pair[0])


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """What the ids' pieces spell, byte pieces joined."""
    spelled = b""
    for one in ids:
        piece = tokenizer.id_to_piece(one)
        if tokenizer.is_byte(one):
            spelled += bytes([int(piece[1:-1], 16)])
        else:
            spelled += piece.replace(_SPACE_MARK, " ").encode()
    # a colour in a message would look like what is supervised
    return spelled.decode("utf-8", "replace").replace("\x1b", "\\x1b")
