"""The runner of a device: few graphs, each from ids to logits, over a paged KV cache.

Legend: as paged_network.py.
"""

from collections.abc import Iterable, Iterator

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mixtral_ms.config.derived.prediction import prediction_dtypes
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.infer.runners.base import Runner, StepInput
from mixtral_ms.infer.runners.first_runs import FirstRuns
from mixtral_ms.infer.runners.graph_network import SharedParameters
from mixtral_ms.infer.runners.host_arrays import padded, shared_parameter
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.infer.runners.paged_network import DeviceParts, PagedNetwork, StepShape
from mixtral_ms.kernels.cells.cache_sizes import CacheSizes, Keys
from mixtral_ms.kernels.cells.elementwise import rotary_tables
from mixtral_ms.kernels.kernel_choice import KernelChoice, PagedCache
from mixtral_ms.log import get_logger
from mixtral_ms.model.nn.compute_dtype import compute_type
from mixtral_ms.parallel.grid.mesh import Mesh

_PIECES = (64, 512)
"""Tokens that pieces of prompts are padded to; longer ones to four times as many, and so on."""
_FEWEST_KEYS = 1024
_GROWTH = 4
_SPARE_BLOCKS = 2
_KEY_MULTIPLE = 16

Prepared = tuple[StepShape, PagedNetwork, tuple[Tensor | None, ...]]


def open_cache(
    config: MixtralConfig,
    weights: InferWeights,
    block_size: int,
    kernels: KernelChoice,
    mesh: Mesh | None = None,
) -> PagedCache | None:
    """The cache of a layer, as the backend wants it; None where it has none."""
    ranks = (mesh or Mesh()).tensor.size
    dtypes = prediction_dtypes(config, weights.dtype, on_device=True)
    return kernels.paged_cache(
        CacheSizes(
            config.num_heads // ranks,
            config.n_kv_heads // ranks,
            config.head_dim,
            block_size,
            config.sliding_window,
            compute_type(dtypes.cache),
        )
    )


class PagedRunner(Runner):
    """Compiles a graph for each of a few shapes, at its first use, which the log says.

    MindSpore is set to graph mode. Tokens of other sequences may change a token's last bits.

    Args:
        config: the network's sizes.
        weights: its tensors.
        num_blocks: of the cache, which is allocated at once.
        cache: how the backend wants it, see `open_cache`.
        kernels: the backend's operators.
        batch: most sequences that get a token in one graph.
        mesh: the ranks, which all take the same steps; `weights` are this one's parts.
    """

    name = "graph"

    def __init__(  # noqa: PLR0913, PLR0917 - what a runner is made of
        self,
        config: MixtralConfig,
        weights: InferWeights,
        num_blocks: int,
        cache: PagedCache,
        kernels: KernelChoice,
        batch: int,
        mesh: Mesh | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
        self.num_blocks, self.block_size, self.batch = num_blocks, cache.sizes.block_size, batch
        self._config, self._cache = config, cache
        dtypes = prediction_dtypes(config, weights.dtype, on_device=True)
        # After the blocks: one of zeros, that those read who are none, and one that they write to.
        self._zero_block, self._spill_block = num_blocks, num_blocks + 1
        shape = cache.shape(num_blocks + _SPARE_BLOCKS)
        layers = range(config.num_layers)
        self._shared = SharedParameters(
            {name: shared_parameter(name, value) for name, value in weights.tensors.items()},
            {
                name: shared_parameter(f"{name}.scale", value)
                for name, value in weights.scales.items()
            },
            tuple(_zeros(f"keys.{i}", shape, cache.sizes.dtype) for i in layers),
            tuple(_zeros(f"values.{i}", shape, cache.sizes.dtype) for i in layers),
            mesh,
            compute_type(dtypes.products),
            tokens_are_columns=False,
        )
        cos, sin = rotary_tables(config.seq_length, config.head_dim, config.theta)
        tables = (shared_parameter("cos", cos), shared_parameter("sin", sin))
        self._parts = DeviceParts(kernels, cache, *tables)
        self._networks: dict[StepShape, PagedNetwork] = {}
        self._run = FirstRuns()
        get_logger().info(
            "prediction computes in %s, the cache is %s (%d blocks), %s; graphs, each compiled at "
            "its first use: %s",
            dtypes.products, dtypes.cache, num_blocks, cache.reads,
            "; ".join(str(one) for one in self.shapes()),
        )  # fmt: skip

    def shapes(self) -> list[StepShape]:
        """Of the graphs that ordinary answers need, those of tokens first."""
        keys = [size for size in self._key_sizes() if size <= self._longest]
        where: Keys = "table" if self._cache.table else "cached"
        gathered = [0] if self._cache.table else keys
        pieces = [size for size in _PIECES if size <= self._piece(self._config.seq_length)]
        return [
            *(StepShape(self.batch, 1, where, size, self.batch) for size in gathered),
            *(StepShape(1, tokens, "own", 0, 1) for tokens in pieces),
            *(StepShape(1, tokens, "cached", size, 1) for tokens in pieces for size in keys),
        ]

    def step(self, inputs: StepInput) -> np.ndarray:
        """As `Runner.step`."""
        logits_RV = np.empty((len(inputs.logit_tokens_R), self._config.vocab_size), np.float32)
        for sequences in _groups(inputs, self.batch):
            tokens = _tokens_of(inputs, sequences)
            # where this group's tokens stand among those that want logits
            wanted = np.flatnonzero(np.isin(inputs.logit_tokens_R, tokens))
            at = np.searchsorted(tokens, inputs.logit_tokens_R[wanted]).astype(np.int32)
            shape, network, tensors = self._prepared(inputs, sequences, tokens, at)
            result = self._run(network, tensors, str(shape))
            logits_RV[wanted] = result[: len(at)] if shape.rows == 1 else result[at]
        return logits_RV

    def graphs(self) -> dict[str, tuple[nn.Cell, tuple[Tensor | None, ...]]]:
        """The largest of the graphs that ordinary answers need, each with its inputs."""
        last = self._config.seq_length - 1
        found = {}
        for shape in self.shapes():
            name = {"own": "prefill", "cached": "prefill, cached keys"}.get(shape.where, "decode")
            if shape.tokens == 1:
                name = "decode"
            positions = np.arange(max(0, last + 1 - shape.tokens), last + 1, dtype=np.int32)
            blocks = -(-self._config.seq_length // self.block_size)
            inputs = StepInput(
                np.zeros(len(positions), np.int32),
                positions,
                np.array([0, len(positions)], np.int32),
                np.zeros((1, blocks), np.int32),
                np.zeros(1, np.int32),
            )
            tensors = self._inputs(inputs, np.zeros(1, int), np.arange(len(positions)), shape)
            rows = None if shape.rows > 1 else Tensor(np.zeros(1, np.int32))
            found[name] = (self._network(shape), (*tensors, rows))
        return found

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """As `Runner.copy_blocks`."""
        pairs = np.array(list(pairs), np.int32).reshape(-1, 2)
        if not len(pairs):
            return
        if not self._cache.table:
            pairs = pairs[:, None] * self.block_size + np.arange(self.block_size)[:, None]
            pairs = pairs.reshape(-1, 2).astype(np.int32)
        source, target = (Tensor(np.ascontiguousarray(pairs[:, i])) for i in (0, 1))
        for cache in (*self._shared.keys, *self._shared.values):
            ops.scatter_update(cache, target, ops.gather(cache, source, 0))

    def _prepared(
        self, inputs: StepInput, sequences: np.ndarray, tokens: np.ndarray, at: np.ndarray
    ) -> Prepared:
        """The graph for some sequences' tokens, whose numbers in it are `at` where wanted."""
        positions_T = inputs.positions_T[tokens]
        rows: Tensor | None = None
        if len(tokens) == len(sequences):
            keys = 0 if self._cache.table else self._keys(int(positions_T.max()) + 1)
            where: Keys = "table" if self._cache.table else "cached"
            shape = StepShape(self.batch, 1, where, keys, self.batch)
        else:
            padded, first = self._piece(len(tokens)), int(positions_T[0]) == 0
            keys = 0 if first else self._keys(int(positions_T[-1]) + 1)
            scored = padded if len(at) > 1 else 1
            shape = StepShape(1, padded, "own" if first else "cached", keys, scored)
            if scored == 1:
                rows = Tensor(at if len(at) else np.zeros(1, np.int32))
        return shape, self._network(shape), (*self._inputs(inputs, sequences, tokens, shape), rows)

    def _inputs(
        self, inputs: StepInput, sequences: np.ndarray, tokens: np.ndarray, shape: StepShape
    ) -> tuple[Tensor | None, ...]:
        count, total = len(tokens), shape.sequences * shape.tokens
        positions_T = inputs.positions_T[tokens]
        blocks = -(-self._config.seq_length // self.block_size)
        tables_NM = np.full((shape.sequences, blocks), self._zero_block, np.int32)
        given_NM = inputs.block_tables_NM[sequences, :blocks]
        tables_NM[: len(sequences), : given_NM.shape[1]] = np.where(
            given_NM < 0, self._zero_block, given_NM
        )
        row_T = np.repeat(np.arange(len(sequences)), count // len(sequences))
        blocks_T = tables_NM[row_T, positions_T // self.block_size]
        slots_T = np.full(total, self._spill_block * self.block_size, np.int32)
        slots_T[:count] = blocks_T * self.block_size + positions_T % self.block_size
        # what is filler sees a position too: of a piece, those that its last token sees
        filler = 0 if shape.tokens == 1 else int(positions_T[-1])
        lengths_N: Tensor | None = None
        seen: Tensor | None = None
        if shape.where == "table":
            seen = Tensor(tables_NM)
            lengths_N = Tensor(padded(positions_T + 1, total, 1))
        elif shape.where == "cached":
            last_N = np.zeros(shape.sequences, np.int32)
            last_N[: len(sequences)] = positions_T[np.cumsum(np.bincount(row_T)) - 1]
            seen = Tensor(self._slots_of_keys(tables_NM, last_N, shape.keys))
        return (
            Tensor(padded(inputs.token_ids_T[tokens], total, 0)),
            Tensor(np.arange(total) < count),
            Tensor(padded(positions_T, total, filler)),
            Tensor(slots_T),
            seen,
            lengths_N,
        )

    def _slots_of_keys(self, tables_NM: np.ndarray, last_N: np.ndarray, keys: int) -> np.ndarray:
        """Slots of positions 0, 1, ...; of zeros where a sequence has none."""
        keys_S = np.arange(keys, dtype=np.int32)
        block_S = np.minimum(keys_S // self.block_size, tables_NM.shape[1] - 1)
        slots_NS = tables_NM[:, block_S] * self.block_size + keys_S % self.block_size
        zero = self._zero_block * self.block_size
        return np.where(keys_S <= last_N[:, None], slots_NS, zero).astype(np.int32)

    def _network(self, shape: StepShape) -> PagedNetwork:
        if shape not in self._networks:
            self._networks[shape] = PagedNetwork(self._config, self._shared, self._parts, shape)
        return self._networks[shape]

    @property
    def _longest(self) -> int:
        """Positions of the context, as gathered keys are counted."""
        return -(-self._config.seq_length // _KEY_MULTIPLE) * _KEY_MULTIPLE

    def _key_sizes(self) -> Iterator[int]:
        size = _FEWEST_KEYS
        while size < self._longest:
            yield size
            size *= _GROWTH
        yield self._longest

    def _keys(self, positions: int) -> int:
        return next(size for size in self._key_sizes() if size >= positions)

    def _piece(self, tokens: int) -> int:
        size = next((size for size in _PIECES if size >= tokens), _PIECES[-1])
        while size < tokens:
            size *= _GROWTH
        return size


def _groups(inputs: StepInput, batch: int) -> Iterator[np.ndarray]:
    """Numbers of the sequences that run together: those with one token, then each piece alone."""
    lengths = np.diff(inputs.starts)
    single = np.flatnonzero(lengths == 1)
    for begin in range(0, len(single), batch):
        yield single[begin : begin + batch]
    for sequence in np.flatnonzero(lengths > 1):
        yield np.array([sequence])


def _tokens_of(inputs: StepInput, sequences: np.ndarray) -> np.ndarray:
    """Numbers of their tokens in the step, ascending."""
    spans = [range(inputs.starts[one], inputs.starts[one + 1]) for one in sequences]
    return np.concatenate([np.array(span) for span in spans])


def _zeros(name: str, shape: tuple[int, ...], dtype: mindspore.Type) -> Parameter:
    return Parameter(ops.zeros(shape, dtype), name=name, requires_grad=False)
