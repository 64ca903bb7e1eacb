"""Where in a text each of its tokens ends, in characters."""

import numpy as np
import sentencepiece


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

    Slow: sentencepiece reports each piece with its place.
    """
    pieces = processor.encode(text, out_type="immutable_proto").pieces
    ids = np.array([piece.id for piece in pieces], np.int32)
    ends = np.array([piece.end for piece in pieces], np.int32)
    # Of a character in several byte pieces only the last has a width: all of them end there.
    for place in range(len(pieces) - 2, -1, -1):
        if processor.is_byte(pieces[place].id) and pieces[place].begin == pieces[place].end:
            ends[place] = ends[place + 1]
    return ids, ends
