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
_PLAIN_PIECE_TYPES = {1, 2, 3, 6}  # normal, unknown, control, byte; no user-defined, no unused
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
            facts.plain_pieces = facts.plain_pieces and _is_plain_piece(value)
        elif number == _TRAINER:
            trainer = dict(wire_fields(value))
            facts.model_type = trainer.get(_MODEL_TYPE, facts.model_type)
            facts.whitespace_as_suffix = trainer.get(_WHITESPACE_AS_SUFFIX, 0)
            facts.byte_fallback = trainer.get(_BYTE_FALLBACK, 0)
        elif number == _NORMALIZER:
            normalizer = dict(wire_fields(value))
            facts.charsmap = normalizer.get(_CHARSMAP, b"")
            facts.dummy_prefix = normalizer.get(_DUMMY_PREFIX, 1)
            facts.remove_extra_spaces = normalizer.get(_REMOVE_EXTRA_SPACES, 1)
            facts.escape_spaces = normalizer.get(_ESCAPE_SPACES, 1)
    return facts


# As sentencepiece writes nearly all pieces: a short text, a score, and no type, which is normal.
_USUAL_PIECE = re.compile(rb"\n[\0-\x7f](.*)\x15.{4}", re.DOTALL)


def _is_plain_piece(piece: bytes) -> bool:
    usual = _USUAL_PIECE.fullmatch(piece)
    if usual and len(usual[1]) == piece[1]:
        parts = {_PIECE_TEXT: usual[1]}
    else:
        parts = dict(wire_fields(piece))
    text = parts.get(_PIECE_TEXT, b"")
    while text.startswith(_SPACE_MARK):
        text = text[len(_SPACE_MARK) :]
    return parts.get(_PIECE_TYPE, 1) in _PLAIN_PIECE_TYPES and _SPACE_MARK not in text


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and raw values of one message. Raises ValueError or IndexError if damaged."""
    position = 0
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
