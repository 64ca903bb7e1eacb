"""The KV cache of a beam search: hypotheses that continue the same one share its full blocks."""

from collections.abc import Sequence as Ids

from mixtral_ms.infer.engine.beam_search import Hypothesis
from mixtral_ms.infer.engine.block_pool import BlockPool, blocks_for
from mixtral_ms.infer.engine.request import Sequence


def reserved_blocks(prompt: int, limit: int, beams: int, block_size: int) -> int:
    """Most blocks that a search ever holds, in the middle of a step too."""
    shared = prompt // block_size
    own = blocks_for(limit, block_size) - shared
    return shared + beams * own + beams


def continue_from(
    sequences: Ids[Sequence],
    parents: Ids[int],
    hypotheses: Ids[Hypothesis],
    prompt_ids: Ids[int],
    pool: BlockPool,
    block_size: int,
) -> tuple[list[Sequence], list[tuple[int, int]]]:
    """The sequences of the next step, and which blocks to copy for them.

    The last block, where it is not full, is written to next: each hypothesis gets a copy.
    """
    children, copies = [], []
    for parent, hypothesis in zip(parents, hypotheses, strict=True):
        source = sequences[parent]
        full = source.computed // block_size
        table = pool.share(source.table[:full])
        if source.computed % block_size:
            table += pool.allocate(1)
            copies.append((source.table[full], table[full]))
        ids = [*prompt_ids, *hypothesis.token_ids]
        children.append(Sequence(ids, table, source.computed))
    for source in sequences:
        pool.release(source.table)
    return children, copies
