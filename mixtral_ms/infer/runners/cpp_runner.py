"""The CPU's fast path: every step is one call of the C++ decoder, KV cache included.

Legend: N sequences, T tokens of a step, R tokens with logits, M blocks of a table, V vocabulary,
L layers, K kv heads, E experts.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from mixtral_ms.config.derived.parameter_row import ParameterRow
from mixtral_ms.config.derived.parameter_table import EMBEDDING, LM_HEAD, parameters_of
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners.base import Runner, RunnerUnavailableError, StepInput
from mixtral_ms.infer.runners.cpp import decoder_library
from mixtral_ms.infer.runners.infer_weights import InferWeights


class CppRunner(Runner):
    """Embedding, layers and head in C++, float32 arithmetic on weights of any dtype.

    Every token of a step is a real one: `pad_token_id` means nothing here, and no expert drops
    a token, whatever capacity the configuration has for training.

    Args:
        config: the network's sizes.
        weights: its tensors; they are used where they lie, mapped files too.
        num_blocks: blocks of the cache.
        block_size: positions in a block.

    Raises:
        RunnerUnavailableError: the C++ kernels cannot be built on this machine, or have no such
            router.
        UserError: a tensor is missing, or has another shape or dtype than it should.
    """

    name = "C++"

    def __init__(
        self, config: MixtralConfig, weights: InferWeights, num_blocks: int, block_size: int
    ) -> None:
        policy = config.moe_config.routing_policy
        if policy not in decoder_library.DECODER_POLICIES:
            raise RunnerUnavailableError(
                f"the C++ decoder lacks moe_config.routing_policy {policy!r}: it has "
                f"{', '.join(decoder_library.DECODER_POLICIES)}"
            )
        library = decoder_library.build()
        if library is None:
            raise RunnerUnavailableError("the C++ kernels are off or cannot be built")
        self._decoder = decoder_library.Decoder(library)
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        _check_weights(config, weights)
        head_stride = -(-config.head_dim // decoder_library.HEAD_UNIT) * decoder_library.HEAD_UNIT
        # Zeros: the decoder never writes behind head_dim. Pages come when they are first used.
        self._cache = np.zeros(
            (config.num_layers, 2, num_blocks, config.n_kv_heads, block_size, head_stride),
            np.float32,
        )
        self._weights = weights  # the addresses below stay good as long as these live
        self._layers = (decoder_library.Layer * config.num_layers)(
            *[_layer(weights, index) for index in range(config.num_layers)]
        )
        self._model = _model(config, weights, self._layers, self._cache)

    def step(self, inputs: StepInput) -> np.ndarray:
        """As `Runner.step`.

        Raises:
            ValueError: an id, a position, a block or a token that there is none of.
        """
        inputs = StepInput(
            *[np.ascontiguousarray(value, np.int32) for value in vars(inputs).values()]
        )
        self._check_step(inputs)
        logits_RV = np.empty((len(inputs.logit_tokens_R), self.config.vocab_size), np.float32)
        for part, chosen_R in self._parts(inputs):
            logits_RV[chosen_R] = self._run(part)
        return logits_RV

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """As `Runner.copy_blocks`."""
        for source, target in pairs:
            if not (0 <= source < self.num_blocks and 0 <= target < self.num_blocks):
                raise ValueError(f"no copy from block {source} to {target}: {self._blocks()}")
            self._cache[:, :, target] = self._cache[:, :, source]

    def _parts(self, inputs: StepInput) -> Iterator[tuple[StepInput, np.ndarray | slice]]:
        """Steps that the decoder takes, each with which of the R tokens are its own.

        Single tokens go together, and so do long chunks; a short one is summed in another way.
        """
        starts = inputs.starts
        lengths_N = np.diff(starts)
        alone_N = lengths_N < self._decoder.shared_from
        if len(lengths_N) == 1 or (lengths_N == 1).all() or not alone_N.any():
            yield inputs, slice(None)
            return
        first = 0
        while first < len(lengths_N):
            last = first + 1
            while last < len(lengths_N) and not alone_N[first] and not alone_N[last]:
                last += 1
            begin, end = starts[first], starts[last]
            chosen_R = (begin <= inputs.logit_tokens_R) & (inputs.logit_tokens_R < end)
            yield (
                StepInput(
                    inputs.token_ids_T[begin:end],
                    inputs.positions_T[begin:end],
                    starts[first : last + 1] - begin,
                    inputs.block_tables_NM[first:last],
                    inputs.logit_tokens_R[chosen_R] - begin,
                ),
                chosen_R,
            )
            first = last

    def _run(self, part: StepInput) -> np.ndarray:
        logits_RV = np.empty((len(part.logit_tokens_R), self.config.vocab_size), np.float32)
        pointers = [array.ctypes.data for array in (*vars(part).values(), logits_RV)]
        sequences, width = part.block_tables_NM.shape
        tokens, scored = len(part.token_ids_T), len(part.logit_tokens_R)
        step = decoder_library.Step(sequences, tokens, width, scored, *pointers)
        self._decoder.step(self._model, step)
        return logits_RV

    def _check_step(self, inputs: StepInput) -> None:
        """The decoder writes where these say: what is wrong in them must not reach it."""
        token_ids_T, positions_T, starts, block_tables_NM, logit_tokens_R = vars(inputs).values()
        tokens, sequences = len(token_ids_T), len(starts) - 1
        if block_tables_NM.shape[:-1] != (sequences,) or positions_T.shape != (tokens,):
            raise ValueError(
                f"{tokens} tokens of {sequences} sequences with positions {positions_T.shape} and "
                f"block tables {block_tables_NM.shape}"
            )
        if starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) < 1).any():
            raise ValueError(f"starts {starts.tolist()} of {tokens} tokens")
        follows_T = np.ones(tokens, bool)
        follows_T[starts[:-1]] = False
        if (np.diff(positions_T)[follows_T[1:]] != 1).any():
            raise ValueError(f"tokens of a sequence at positions {positions_T.tolist()}")
        _check_range("token id", token_ids_T, self.config.vocab_size, "the vocabulary's size")
        _check_range("token with logits", logit_tokens_R, tokens, "the number of tokens")
        width = block_tables_NM.shape[1]
        _check_range("position", positions_T, width * self.block_size, "the block table's reach")
        for table_M, end in zip(block_tables_NM, positions_T[starts[1:] - 1], strict=True):
            used = table_M[: end // self.block_size + 1]
            _check_range("block", used, self.num_blocks, self._blocks())

    def _blocks(self) -> str:
        return f"num_blocks {self.num_blocks}"


def _check_range(what: str, values: np.ndarray, limit: int, of: str) -> None:
    if values.size and not (values.min() >= 0 and values.max() < limit):
        wrong = values[(values < 0) | (values >= limit)][0]
        raise ValueError(f"{what} {wrong} is not between 0 and {limit - 1} ({of})")


def _check_weights(config: MixtralConfig, weights: InferWeights) -> None:
    for name, row in parameters_of(config):
        if not row.decoder:
            raise RunnerUnavailableError(f"the C++ decoder knows no {name}")
        tensor, shape = weights.tensors.get(name), row.shape(config)
        if tensor is None:
            raise UserError(f"the weights have no {name!r}, which the configuration asks for")
        if tensor.shape != shape:
            raise UserError(
                f"{name!r} has shape {tensor.shape}; the configuration asks for {shape}"
            )
        kind = "float32" if row.always_float32 else weights.dtype
        if tensor.dtype != kind or not tensor.flags.c_contiguous:
            raise UserError(f"{name!r} is {tensor.dtype}; it must be row-major {kind}")
        scale = weights.scales.get(name)
        if (scale is not None) != (kind == "int8"):
            raise UserError(f"{name!r} is {kind}: int8 tensors have scales, and no others")
        if scale is not None and (scale.shape != shape[:-1] or scale.dtype != np.float32):
            raise UserError(
                f"scales of {name!r} are {scale.dtype} {scale.shape}; they must be float32 "
                f"{shape[:-1]}"
            )


def _pointer(
    weights: InferWeights, row: ParameterRow, layer: int = 0
) -> decoder_library.Matrix | int | None:
    """What the decoder's field for a parameter holds."""
    tensor, scale, bias = weights.of(row, layer)
    if tensor.ndim == 1:
        return decoder_library.address(tensor)
    return decoder_library.matrix(tensor, scale, bias)


def _layer(weights: InferWeights, index: int) -> decoder_library.Layer:
    rows = decoder_library.LAYER_WEIGHTS
    return decoder_library.Layer(**{row.decoder: _pointer(weights, row, index) for row in rows})


def _model(
    config: MixtralConfig, weights: InferWeights, layers: object, cache: np.ndarray
) -> decoder_library.Model:
    moe = config.moe_config
    outside = {
        row.decoder: _pointer(weights, row)
        for row in decoder_library.MODEL_WEIGHTS
        if row.present(config)
    }
    outside.setdefault(LM_HEAD.decoder, outside[EMBEDDING.decoder])  # of tied embeddings
    return decoder_library.Model(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        experts=moe.expert_num,
        top_k=moe.num_experts_chosen,
        vocabulary=config.vocab_size,
        layers=config.num_layers,
        window=config.sliding_window or 0,
        normalise_gates=moe.norm_topk_prob,
        uniform_routing=moe.uniform_routing,
        num_blocks=cache.shape[2],
        block_size=cache.shape[4],
        theta=config.theta,
        eps=config.rms_norm_eps,
        layer=layers,
        cache=decoder_library.address(cache),
        **outside,
    )
