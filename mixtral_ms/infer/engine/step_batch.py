"""What the runner is given for the chunks of one step."""

import numpy as np

from mixtral_ms.infer.engine.scheduler import Chunk
from mixtral_ms.infer.runners.base import NO_BLOCK, StepInput


def wants_logits(chunk: Chunk) -> list[int]:
    """Which tokens of a chunk need logits, counted from its first.

    The last one when the next token is not known yet; all of a prompt whose log-probabilities are
    asked for and not yet there.
    """
    request, count = chunk.request, chunk.end - chunk.begin
    scored = request.params.prompt_logprobs and len(request.prompt_logprobs) == chunk.begin
    if scored and chunk.end <= len(request.prompt_ids):
        return list(range(count))
    return [count - 1] if chunk.end == len(chunk.sequence.ids) else []


def step_input(chunks: list[Chunk], scored: list[list[int]]) -> StepInput:
    """The runner's input; `scored` is `wants_logits` of each chunk."""
    lengths = [chunk.end - chunk.begin for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    longest = max(len(chunk.sequence.table) for chunk in chunks)
    tables = np.full((len(chunks), longest), NO_BLOCK, np.int32)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.sequence.table)] = chunk.sequence.table
    tokens = [one for chunk in chunks for one in chunk.sequence.ids[chunk.begin : chunk.end]]
    positions = [np.arange(chunk.begin, chunk.end, dtype=np.int32) for chunk in chunks]
    wanted = [start + token for start, each in zip(starts, scored, strict=False) for token in each]
    return StepInput(
        token_ids_T=np.array(tokens, np.int32),
        positions_T=np.concatenate(positions),
        starts=starts,
        block_tables_NM=tables,
        logit_tokens_R=np.array(wanted, np.int32),
    )
