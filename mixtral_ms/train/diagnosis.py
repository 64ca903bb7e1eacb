"""Where numbers stopped being finite."""

import numpy as np
from mindspore import Tensor

from mixtral_ms.data.batch import Batch
from mixtral_ms.model.mixtral import MixtralModel
from mixtral_ms.train.step import TrainStep


def first_non_finite(step: TrainStep, micro_batches: list[Batch]) -> str:
    """Names the first layer output, or else the first gradient, that is not finite.

    Runs the network once more, layer by layer, with its current weights, over the step's data.
    """
    for name, parameter in step.network.parameters_and_names():
        if not np.isfinite(parameter.asnumpy()).all():
            return f"the weight {name} itself"
    for batch in micro_batches:
        layer = _first_layer(step.network.model, batch)
        if layer is not None:
            return f"the output of model.layers.{layer}"
    gradient = step.first_non_finite_gradient()
    if gradient is None:
        return "the sum of squares of all gradients (each of them is finite)"
    return f"the gradient of {gradient}"


def _first_layer(model: MixtralModel, batch: Batch) -> int | None:
    """Number of the first layer whose output for a batch is not finite."""
    input_ids = Tensor(batch.input_ids)
    x, valid_T = model.tok_embeddings(input_ids), model.valid_tokens(input_ids)
    for index, layer in enumerate(model.layers):
        x = layer(x, valid_T, model.cos, model.sin)[0]
        if not np.isfinite(x.asnumpy()).all():
            return index
    return None
