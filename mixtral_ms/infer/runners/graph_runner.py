"""The runner in MindSpore operators on a CPU: over ranks, and without a C++ compiler.

Legend: as graph_network.py.
"""

from collections.abc import Iterable

import mindspore
import numpy as np
from mindspore import Tensor, ops

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.infer.runners.base import Runner, StepInput
from mixtral_ms.infer.runners.first_runs import FirstRuns
from mixtral_ms.infer.runners.graph_network import (
    DECODE_TOKENS,
    CachedNetwork,
    Head,
    SharedParameters,
)
from mixtral_ms.infer.runners.host_arrays import padded, shared_parameter
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.kernels.cells.elementwise import rotary_tables
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.parallel.grid.mesh import Mesh

_MASKED = -3.0e4
_FEWEST_TOKENS, _FEWEST_KEYS = 16, 64
_GROWTH = 4  # a step's shapes are rounded up to 16, 64, 256 ... tokens and 64, 256 ... keys
_PADDING_SLOTS = 2


class GraphRunner(Runner):
    """Compiles a graph for each rounded shape, at its first use; computes in float32.

    MindSpore is set to graph mode.

    Args:
        config: the network's sizes.
        weights: its tensors.
        num_blocks, block_size: of the cache, which is allocated at once.
        mesh: the ranks, which all take the same steps; `weights` are this one's parts.
    """

    name = "graph"

    def __init__(
        self,
        config: MixtralConfig,
        weights: InferWeights,
        num_blocks: int,
        block_size: int,
        mesh: Mesh | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
        self.num_blocks, self.block_size = num_blocks, block_size
        self._config = config
        self._kernels = select_kernels(dropless=True)
        # After the blocks: a slot of zeros to read for keys that are none, and one to write to.
        self._zero_slot = num_blocks * block_size
        kv_heads = config.n_kv_heads // mesh.tensor.size
        shape = (self._zero_slot + _PADDING_SLOTS, kv_heads, config.head_dim)
        layers = range(config.num_layers)
        self._shared = SharedParameters(
            {name: shared_parameter(name, value) for name, value in weights.tensors.items()},
            {
                name: shared_parameter(f"{name}.scale", value)
                for name, value in weights.scales.items()
            },
            tuple(shared_parameter(f"keys.{i}", np.zeros(shape, np.float32)) for i in layers),
            tuple(shared_parameter(f"values.{i}", np.zeros(shape, np.float32)) for i in layers),
            mesh,
        )
        self._cos, self._sin = rotary_tables(config.seq_length, config.head_dim, config.theta)
        self._networks: dict[tuple[int, int, int], CachedNetwork] = {}
        self._head = Head(config, self._shared)
        self._first_runs = FirstRuns()

    def step(self, inputs: StepInput) -> np.ndarray:
        """As `Runner.step`."""
        groups = [self._run(inputs, *group) for group in _groups(inputs)]
        return self._logits(np.concatenate(groups)[inputs.logit_tokens_R])

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """As `Runner.copy_blocks`."""
        pairs = np.array(list(pairs), np.int32).reshape(-1, 2)
        if not len(pairs):
            return
        slots = pairs[:, :, None] * self.block_size + np.arange(self.block_size, dtype=np.int32)
        source, target = (Tensor(slots[:, i].reshape(-1)) for i in (0, 1))
        for cache in (*self._shared.keys, *self._shared.values):
            ops.scatter_update(cache, target, ops.gather(cache, source, 0))

    def _run(self, inputs: StepInput, chosen: slice, sequences: int, per: int) -> np.ndarray:
        """Hidden states (tokens, D) of the chosen ones, padded to `sequences` of `per` tokens."""
        network, tensors = self._prepared(inputs, chosen, sequences, per)
        tokens = inputs.starts[chosen.stop] - inputs.starts[chosen.start]
        what = f"{sequences} x {per} tokens over {tensors[-1].shape[-1]} positions"
        return self._first_runs(network, tensors, what)[:tokens]

    def _prepared(
        self, inputs: StepInput, chosen: slice, sequences: int, per: int
    ) -> tuple[CachedNetwork, tuple[Tensor, ...]]:
        begin, end = inputs.starts[chosen.start], inputs.starts[chosen.stop]
        positions_T = inputs.positions_T[begin:end]
        tables_NM = inputs.block_tables_NM[chosen]
        tokens, count = end - begin, len(tables_NM)
        positions_Nt = positions_T.reshape(count, -1)
        window = self._config.sliding_window or self._config.seq_length
        first_N1 = np.maximum(positions_Nt[:, :1] - window + 1, 0)
        keys = _rounded(int((positions_Nt[:, -1:] - first_N1).max()) + 1, _FEWEST_KEYS)
        key_positions_NS = first_N1 + np.arange(keys, dtype=np.int32)

        seen_NS = np.full((sequences, keys), self._zero_slot, np.int32)
        exists_NS = key_positions_NS <= positions_Nt[:, -1:]
        seen_NS[:count] = np.where(
            exists_NS, self._cache_slots(tables_NM, key_positions_NS), self._zero_slot
        )
        distance_NtS = positions_Nt[:, :, None] - key_positions_NS[:, None]
        mask_NtS = np.full((sequences, per, keys), _MASKED, np.float32)
        mask_NtS[:count, : positions_Nt.shape[1]] = np.where(
            (distance_NtS >= 0) & (distance_NtS < window), 0, _MASKED
        )
        total = sequences * per
        token_ids_T = padded(inputs.token_ids_T[begin:end], total, 0)
        cache_slots_T = self._cache_slots(tables_NM, positions_Nt).reshape(-1)
        positions_T = padded(positions_T, total, 0)
        return self._network(sequences, per, keys), (
            Tensor(token_ids_T),
            Tensor(np.arange(total) < tokens),
            Tensor(positions_T),
            Tensor(self._cos[positions_T][:, None]),
            Tensor(self._sin[positions_T][:, None]),
            Tensor(padded(cache_slots_T, total, self._zero_slot + 1)),
            Tensor(seen_NS),
            Tensor(mask_NtS[:, None]),
        )

    def _cache_slots(self, tables_NM: np.ndarray, positions_NS: np.ndarray) -> np.ndarray:
        """Slots of the KV cache; whatever lies behind a table's end is not to be used."""
        block_NS = np.minimum(positions_NS // self.block_size, tables_NM.shape[1] - 1)
        blocks_NS = np.take_along_axis(tables_NM, block_NS, 1)
        return blocks_NS * self.block_size + positions_NS % self.block_size

    def _network(self, sequences: int, per: int, keys: int) -> CachedNetwork:
        shape = (sequences, per, keys)
        if shape not in self._networks:
            self._networks[shape] = CachedNetwork(
                self._config, self._shared, self._kernels, sequences
            )
        return self._networks[shape]

    def _logits(self, hidden_RD: np.ndarray) -> np.ndarray:
        logits_RV = np.empty((len(hidden_RD), self._config.vocab_size), np.float32)
        for begin in range(0, len(hidden_RD), DECODE_TOKENS):
            group = hidden_RD[begin : begin + DECODE_TOKENS]
            padded = np.zeros((DECODE_TOKENS, group.shape[1]), np.float32)
            padded[: len(group)] = group
            logits_VT = self._first_runs(self._head, (Tensor(padded),), "the head")
            logits_RV[begin : begin + len(group)] = logits_VT.T[: len(group)]
        return logits_RV


def _groups(inputs: StepInput) -> list[tuple[slice, int, int]]:
    """Sequences that run together; how many a graph has, and how many tokens of each."""
    count = len(inputs.starts) - 1
    if len(inputs.token_ids_T) == count:
        begins = range(0, count, DECODE_TOKENS)
        return [
            (slice(begin, min(begin + DECODE_TOKENS, count)), DECODE_TOKENS, 1) for begin in begins
        ]
    return [
        (slice(i, i + 1), 1, _rounded(int(length), _FEWEST_TOKENS))
        if length > 1
        else (slice(i, i + 1), DECODE_TOKENS, 1)
        for i, length in enumerate(np.diff(inputs.starts))
    ]


def _rounded(size: int, least: int) -> int:
    while least < size:
        least *= _GROWTH
    return least
