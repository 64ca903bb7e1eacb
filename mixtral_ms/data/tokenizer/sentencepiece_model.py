"""What a sentencepiece model file says of itself, read from its protobuf wire format.

Read by hand because MindSpore has to be the first to import the protobuf package in a process: it
chooses the implementation its own old generated code needs, and fails to import otherwise.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_PIECE_TEXT, _PIECE_TYPE = 1, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5

_BPE = 2
_NORMAL = 1
_PLAIN_PIECE_TYPES = {_NORMAL, 2, 3, 6}  # and unknown, control, byte; no user-defined, no unused
_SPACE_MARK = "\u2581".encode()


@dataclass
class _Facts:
    """The fields that decide, with the defaults of sentencepiece's schema."""

    model_type: int = 1
    whitespace_as_suffix: int = 0
    byte_fallback: int = 0
    charsmap: bytes = b""
    dummy_prefix: int = 1
    remove_extra_spaces: int = 1
    escape_spaces: int = 1
    plain_pieces: bool = True


def is_plain_bpe(model: bytes) -> bool:
    """Whether a serialized model is BPE that keeps its text and never joins two words.

    True for BPE with byte fallback and dummy prefix, no normalisation, white space kept, no
    user-defined pieces and no piece with a space after another character. False for anything else,
    and for what cannot be read.
    """
    try:
        facts = _read_facts(model)
    except (IndexError, ValueError):
        return False
    return (
        facts.model_type == _BPE
        and bool(facts.byte_fallback)
        and not facts.whitespace_as_suffix
        and not facts.charsmap
        and bool(facts.dummy_prefix)
        and not facts.remove_extra_spaces
        and bool(facts.escape_spaces)
        and facts.plain_pieces
    )


def _read_facts(model: bytes) -> _Facts:
    facts = _Facts()
    for number, value in wire_fields(model):
        if number == _PIECES:
            facts.plain_pieces = facts.plain_pieces and _is_plain_piece(_as_bytes(value))
        elif number == _TRAINER:
            trainer = WireMessage(_as_bytes(value))
            facts.model_type = trainer.number(_MODEL_TYPE, facts.model_type)
            facts.whitespace_as_suffix = trainer.number(_WHITESPACE_AS_SUFFIX, 0)
            facts.byte_fallback = trainer.number(_BYTE_FALLBACK, 0)
        elif number == _NORMALIZER:
            normalizer = WireMessage(_as_bytes(value))
            facts.charsmap = normalizer.bytes(_CHARSMAP)
            facts.dummy_prefix = normalizer.number(_DUMMY_PREFIX, 1)
            facts.remove_extra_spaces = normalizer.number(_REMOVE_EXTRA_SPACES, 1)
            facts.escape_spaces = normalizer.number(_ESCAPE_SPACES, 1)
    return facts


# As sentencepiece writes nearly all pieces: a short text, a score, and no type, which is normal.
_USUAL_PIECE = re.compile(rb"\n[\0-\x7f](.*)\x15.{4}", re.DOTALL)


def _is_plain_piece(piece: bytes) -> bool:
    usual = _USUAL_PIECE.fullmatch(piece)
    if usual and len(usual[1]) == piece[1]:
        text, kind = usual[1], _NORMAL
    else:
        parts = WireMessage(piece)
        text, kind = parts.bytes(_PIECE_TEXT), parts.number(_PIECE_TYPE, _NORMAL)
    while text.startswith(_SPACE_MARK):
        text = text[len(_SPACE_MARK) :]
    return kind in _PLAIN_PIECE_TYPES and _SPACE_MARK not in text


class WireMessage:
    """The fields of one message by number; of a repeated one the last.

    Raises ValueError or IndexError for a damaged message, and ValueError for a field of another
    type than asked for.
    """

    def __init__(self, message: bytes) -> None:
        self._fields = dict(wire_fields(message))

    def number(self, field: int, default: int) -> int:
        """An integer, a truth value or an enumerated one."""
        value = self._fields.get(field, default)
        if not isinstance(value, int):
            raise ValueError(f"field {field} is no number")
        return value

    def bytes(self, field: int) -> bytes:
        """A text or bytes, empty when it is absent."""
        return _as_bytes(self._fields.get(field, b""))


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where bytes belong")
    return value


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and raw values of one message. Raises ValueError or IndexError if damaged."""
    position = 0
    value: int | bytes
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
        elif kind in (_BYTES, _FIXED32, _FIXED64):
            if kind == _BYTES:
                length, position = _varint(message, position)
            else:
                length = 4 if kind == _FIXED32 else 8
            value = message[position : position + length]
            position += length
            if position > len(message):
                raise ValueError("a field ends beyond the message")
        else:
            raise ValueError(f"wire type {kind}")
        yield tag >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A variable-length integer and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
