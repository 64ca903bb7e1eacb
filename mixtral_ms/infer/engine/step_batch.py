"""What the runner is given for the pieces of one step."""

import numpy as np

from mixtral_ms.infer.engine.scheduler import Piece
from mixtral_ms.infer.runners.base import NO_BLOCK, StepInput


def wants_logits(piece: Piece) -> list[int]:
    """Which tokens of a piece need logits, counted from its first.

    The last one when the next token is not known yet; all of a prompt whose log-probabilities are
    asked for and not yet there.
    """
    request, count = piece.request, piece.end - piece.begin
    scored = request.params.prompt_logprobs and len(request.prompt_logprobs) == piece.begin
    if scored and piece.end <= len(request.prompt_ids):
        return list(range(count))
    return [count - 1] if piece.end == len(piece.sequence.ids) else []


def step_input(pieces: list[Piece], scored: list[list[int]]) -> StepInput:
    """The runner's input; `scored` is `wants_logits` of each piece."""
    lengths = [piece.end - piece.begin for piece in pieces]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    longest = max(len(piece.sequence.table) for piece in pieces)
    tables = np.full((len(pieces), longest), NO_BLOCK, np.int32)
    for table, piece in zip(tables, pieces, strict=True):
        table[: len(piece.sequence.table)] = piece.sequence.table
    tokens = [one for piece in pieces for one in piece.sequence.ids[piece.begin : piece.end]]
    positions = [np.arange(piece.begin, piece.end, dtype=np.int32) for piece in pieces]
    wanted = [start + token for start, each in zip(starts, scored, strict=False) for token in each]
    return StepInput(
        token_ids_T=np.array(tokens, np.int32),
        positions_T=np.concatenate(positions),
        starts=starts,
        block_tables_NM=tables,
        logit_tokens_R=np.array(wanted, np.int32),
    )
