"""The contract between the engine and what runs the network.

Legend: N sequences, T tokens of a step, R tokens with logits, M blocks of a table, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NO_BLOCK = -1
"""Fills the entries of a block table that name no block."""


class RunnerUnavailableError(RuntimeError):
    """This machine, or these weights, cannot use a runner; the message says why."""


@dataclass(frozen=True)
class StepInput:
    """Tokens that the network takes in one step.

    A step is a piece of each of some prompts, or one token of each of N sequences (T = N).
    """

    token_ids_T: np.ndarray
    """int32."""
    positions_T: np.ndarray
    """int32, from 0 in each sequence."""
    starts: np.ndarray
    """int32 (N + 1): tokens of sequence i are starts[i] : starts[i + 1], at ascending positions."""
    block_tables_NM: np.ndarray
    """int32, block numbers of each sequence's KV cache, NO_BLOCK where there is none; position p
    lies in block_tables_NM[i, p // block_size] at p % block_size."""
    logit_tokens_R: np.ndarray
    """int32, which of the T tokens need logits."""


class Runner(ABC):
    """The network with its KV cache.

    A token's logits are the same, bit for bit, whatever else is in the step.
    """

    name: str
    """For the log: "C++", "graph"."""
    block_size: int
    """Positions in a block of the cache."""
    num_blocks: int
    """Blocks of the cache, numbered from 0."""

    @abstractmethod
    def step(self, inputs: StepInput) -> np.ndarray:
        """Take the tokens into the cache and return the logits asked for, float32 (R, V).

        Each token sees positions 0 up to its own, or the last `sliding_window` of them.
        """

    @abstractmethod
    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy cache blocks, (from, to) each; no block is both."""
