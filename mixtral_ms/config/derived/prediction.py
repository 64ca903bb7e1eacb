"""What prediction computes with, as it follows from a run's keys: sizes and number formats."""

from dataclasses import dataclass, replace

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import RunConfig

PREFILL_CHUNK = 512
"""Tokens of a prompt that are taken at a time."""
USUAL_BATCH = 32
"""Sequences that are answered at once, where nothing else is said."""
_SIXTEEN_BITS = ("float16", "bfloat16")
_ATTENTION_OF_FLOAT32 = "bfloat16"  # Ascend's attention takes 16 bits only


@dataclass(frozen=True)
class PredictionDtypes:
    """Number formats of a network that answers; router, softmax and logits are float32 anyway."""

    products: str
    """Of the matrix products and of what they give."""
    cache: str
    """Of the KV cache, and of attention's inputs."""


def prediction_dtypes(
    model: MixtralConfig, weight_dtype: str, *, on_device: bool
) -> PredictionDtypes:
    """Formats of prediction.

    A CPU computes in float32, whose numbers do not depend on what else is in a batch. A device
    computes in the weights' own format, so that no token pays for casts of all weights, and int8
    ones in compute_dtype.

    Args:
        model: the network's section.
        weight_dtype: how weights are stored.
        on_device: whether an Ascend device computes.
    """
    if not on_device:
        return PredictionDtypes("float32", "float32")
    wanted = model.compute_dtype
    products = wanted if weight_dtype == "int8" else weight_dtype
    if products in _SIXTEEN_BITS:
        return PredictionDtypes(products, products)
    return PredictionDtypes(products, wanted if wanted in _SIXTEEN_BITS else _ATTENTION_OF_FLOAT32)


def stored_dtype(name: str, weight_dtype: str) -> str:
    """Format in which prediction keeps a parameter."""
    return "float32" if row_of(name).always_float32 else weight_dtype


def prediction_grid(grid: ParallelConfig) -> ParallelConfig:
    """How weights are cut: a rank needs what it has in training, but of the embedding all."""
    return replace(grid, vocab_emb_dp=True)


def prediction_batch(config: RunConfig) -> int:
    """Most sequences that are answered at once."""
    return config.predict_batch_size or USUAL_BATCH
