"""The contract between the engine and what runs the network, and the choice of a runner.

Legend: N sequences, T tokens of a step, R rows of logits, M blocks of a table, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.mesh import Mesh

if TYPE_CHECKING:
    from mixtral_ms.infer.weights import InferWeights

BACKENDS = ("auto", "native", "graph")
NO_BLOCK = -1
"""Fills the places of a block table that name no block."""


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
    """int32, the place of each token in its sequence, from 0."""
    starts: np.ndarray
    """int32 (N + 1): tokens of sequence i are starts[i] : starts[i + 1], at consecutive places."""
    block_tables_NM: np.ndarray
    """int32, block numbers of each sequence's cache, NO_BLOCK where there is none; position p lies
    in block_tables_NM[i, p // block_size] at p % block_size."""
    logit_rows_R: np.ndarray
    """int32, which of the T rows need logits."""


class Runner(ABC):
    """The network with its cache of keys and values.

    A row of logits is the same, bit for bit, whatever else is in the step.
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


def select_runner(
    config: MixtralConfig,
    weights: "InferWeights",
    num_blocks: int | None = None,
    block_size: int | None = None,
    *,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> Runner:
    """The C++ runner where it can be had, else the graph runner; the log says which.

    Over several ranks it is the graph runner.

    Args:
        config: the network's sizes.
        weights: its tensors.
        num_blocks: blocks of the cache; None takes `num_blocks` of the configuration.
        block_size: positions in a block; None takes `block_size` of the configuration.
        backend: "auto", or "native" or "graph" for that one and no other.
        mesh: the ranks; None for one process.

    Raises:
        UserError: another backend.
        RunnerUnavailableError: "native" was asked for by name and cannot be had.
    """
    if backend not in BACKENDS:
        raise UserError(f"runner {backend!r}: allowed are {', '.join(BACKENDS)}")
    num_blocks, block_size = num_blocks or config.num_blocks, block_size or config.block_size
    over_ranks = mesh is not None and mesh.world_size > 1
    if backend in ("auto", "native") and not over_ranks:
        from mixtral_ms.infer.native_runner import NativeRunner  # noqa: PLC0415 - it compiles

        try:
            return NativeRunner(config, weights, num_blocks, block_size)
        except RunnerUnavailableError as error:
            if backend == "native":
                raise
            get_logger().info("the C++ runner cannot be used: %s", error)
    from mixtral_ms.infer.graph_runner import GraphRunner  # noqa: PLC0415 - imports MindSpore

    return GraphRunner(config, weights, num_blocks, block_size, mesh)
