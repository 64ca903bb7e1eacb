"""Weights as a runner wants them: float32, float16, or int8 with a scale per output row."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

WeightDtype = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class InferWeights:
    """Every tensor of the network under its parameter's name.

    Weights of linear layers are (out, in), of experts w1 and w3 (E, F, D), w2 (E, D, F).
    Embedding, norms, biases and router are float32 whatever the dtype.
    """

    dtype: WeightDtype
    tensors: dict[str, np.ndarray]
    """Row-major; float32, float16 or int8. May be read-only views of a mapped file."""
    scales: dict[str, np.ndarray]
    """float32, one per output row, (out,) or (E, out), of int8 tensors only:
    weight = tensor * scale[..., None]."""
