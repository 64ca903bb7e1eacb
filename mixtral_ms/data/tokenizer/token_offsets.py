"""Where in a text each of its tokens ends, in characters."""

import numpy as np
import sentencepiece

from mixtral_ms.data.tokenizer.sentencepiece_model import WireMessage, wire_fields

_PIECES = 2  # of SentencePieceText
_ID, _BEGIN, _END = 2, 4, 5  # of its pieces


def piece_lengths(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Characters that each piece stands for, int32 (V,), for models that keep their text.

    A byte piece counts for its character when it is the first byte of one, the others for nothing.
    """
    lengths = np.zeros(processor.vocab_size(), np.int32)
    for one in range(len(lengths)):
        if processor.is_byte(one):
            byte = int(processor.id_to_piece(one)[1:-1], 16)
            lengths[one] = byte & 0xC0 != 0x80
        elif not (processor.is_control(one) or processor.is_unknown(one)):
            lengths[one] = len(processor.id_to_piece(one))
    return lengths


def encode_with_proto(
    processor: sentencepiece.SentencePieceProcessor, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and ends of a text's tokens, both int32 (tokens,), whatever the model does to the text.

    Slow: sentencepiece reports each piece with its offset, in bytes, as a serialized protobuf (the
    one form that all its versions have).
    """
    message = processor.encode(text, out_type="serialized_proto")
    pieces = [
        WireMessage(piece)
        for number, piece in wire_fields(message)
        if number == _PIECES and isinstance(piece, bytes)
    ]
    ids = np.array([piece.number(_ID, 0) for piece in pieces], np.int32)
    ends = np.array([piece.number(_END, 0) for piece in pieces], np.int32)
    # Of a character in several byte pieces only the last has a width: all of them end there.
    for index in range(len(pieces) - 2, -1, -1):
        piece = pieces[index]
        if processor.is_byte(int(ids[index])) and piece.number(_BEGIN, 0) == piece.number(_END, 0):
            ends[index] = ends[index + 1]
    begins_character = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80
    characters = np.concatenate([[0], begins_character.cumsum()]).astype(np.int32)
    return ids, characters[ends]
