"""The C++ decoder through ctypes: a whole step of generation in one call on numpy arrays.

The structures mirror decoder.hpp, field by field; every number is 64 bits wide, so that neither
side has padding.
"""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path

import numpy as np

from mixtral_ms.config.derived.parameter_table import PARAMETERS
from mixtral_ms.kernels.native.build import built_library

TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 2}
"""dtypes that a weight may have, with their number in decoder.hpp."""
_FIELDS = [row for row in PARAMETERS if row.decoder and "." not in row.decoder]
LAYER_WEIGHTS = [row for row in _FIELDS if row.stage == "layer"]
MODEL_WEIGHTS = [row for row in _FIELDS if row.stage != "layer"]
"""Parameters with a field of their own in `Layer` and in `Model`, in its order."""
DECODER_POLICIES = ("TopkRouterV2",)
"""Values of `moe_config.routing_policy` whose rule decoder_experts.cpp has."""
HEAD_UNIT = 16
"""A cached head takes a multiple of this many floats (`Model::head_stride`)."""


def build() -> Path | None:
    """Path of the library, which does without MindSpore; None where it cannot be used."""
    return built_library("decoder", Path(__file__).parent)


class Matrix(Structure):
    """A weight (rows, cols), or E of them; build it with `matrix`."""

    _fields_ = [
        *[(name, c_void_p) for name in ("data", "scale", "bias")],
        *[(name, c_int64) for name in ("rows", "cols", "type")],
    ]


class Layer(Structure):
    """Weights of a decoder layer."""

    _fields_ = [(row.decoder, Matrix if len(row.axes) > 1 else c_void_p) for row in LAYER_WEIGHTS]


class Model(Structure):
    """Sizes, weights and cache."""

    _fields_ = [
        *[
            (name, c_int64)
            for name in (
                *("hidden", "heads", "kv_heads", "head_dim", "intermediate", "experts", "top_k"),
                *("vocabulary", "layers", "window", "normalise_gates", "uniform_routing"),
                *("num_blocks", "block_size"),
            )
        ],
        *[(name, c_double) for name in ("theta", "eps")],
        *[(row.decoder, Matrix if len(row.axes) > 1 else c_void_p) for row in MODEL_WEIGHTS],
        ("layer", POINTER(Layer)),
        ("cache", c_void_p),
    ]


class Step(Structure):
    """Tokens of a step and room for their logits."""

    _fields_ = [
        *[(name, c_int64) for name in ("sequences", "tokens", "table_width", "logit_tokens")],
        *[
            (name, c_void_p)
            for name in (
                "token_ids",
                "positions",
                "starts",
                "block_tables",
                "with_logits",
                "logits",
            )
        ],
    ]


def matrix(
    data: np.ndarray, scale: np.ndarray | None = None, bias: np.ndarray | None = None
) -> Matrix:
    """Points to a row-major weight (out, in) or (E, out, in); the caller keeps the arrays alive.

    Args:
        data: float32, float16 or int8.
        scale: float32, one per output row, of int8 data; None for the others.
        bias: float32 (out,).
    """
    rows, cols = data.shape[-2:]
    return Matrix(address(data), address(scale), address(bias), rows, cols, TYPES[data.dtype])


def address(array: np.ndarray | None) -> int | None:
    """Where an array's first value lies; None for None."""
    return None if array is None else array.ctypes.data


class Decoder:
    """The functions of the built library.

    Args:
        library: what `build` returned.

    Raises:
        RuntimeError: the library was built from other structures than these.
    """

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        sizes = (c_int64 * 4)()
        functions.decoder_layout(sizes)
        own = [ctypes.sizeof(kind) for kind in (Matrix, Layer, Model, Step)]
        if list(sizes) != own:
            raise RuntimeError(f"decoder.hpp has structures of {list(sizes)} bytes, we of {own}")
        functions.decoder_shared_from.restype = c_int64
        self.shared_from = functions.decoder_shared_from()
        """Tokens of a prompt's chunk from which it may share a step with others."""
        self._step = functions.decoder_step
        self._step.argtypes = [POINTER(Model), POINTER(Step)]
        self._step.restype = None

    def step(self, model: Model, step: Step) -> None:
        """Take the step's tokens into the cache and write their logits; nothing is checked."""
        self._step(model, step)
