"""Where numbers stopped being finite."""

import numpy as np

from mixtral_ms.config.derived.pipeline_stages import stage_layers
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.train.objectives.objective import network_tensors
from mixtral_ms.train.step.pipeline_gradients import Neighbours
from mixtral_ms.train.step.train_step import TrainStep, first_of_ranks


def first_non_finite(step: TrainStep, micro_batches: list[Batch]) -> str:
    """Names the first layer output, or else the first gradient, that is not finite on any rank.

    Runs the network once more, layer by layer, with its current weights, over the step's data. All
    ranks must call it.
    """
    network = step.network
    weight = first_of_ranks(network, _first_weight(network))
    if weight is not None:
        return f"the weight {weight} itself"
    for batch in micro_batches:
        found = gather_objects(network.mesh.world, _first_layer(network, batch))
        layers = [layer for layer in found if layer is not None]
        if layers:
            return f"the output of model.layers.{min(layers)}"
    gradient = step.first_non_finite_gradient()
    if gradient is None:
        return "the sum of squares of all gradients (each of them is finite)"
    return f"the gradient of {gradient}"


def _first_weight(network: MixtralForCausalLM) -> str | None:
    """Name of this rank's first weight that is not finite."""
    for parameter in network.get_parameters():
        if not np.isfinite(parameter.asnumpy()).all():
            return parameter.name
    return None


def _first_layer(network: MixtralForCausalLM, batch: Batch) -> int | None:
    """Number of the stage's first layer whose output for a batch is not finite."""
    model, mesh = network.model, network.mesh
    input_ids, segment_ids, positions = network_tensors(network, batch)
    if segment_ids is not None and model.packed_samples is not None:
        segment_ids = model.packed_samples(segment_ids)
    beside = Neighbours(network, batch)
    x = beside.input_of_stage()
    if mesh.is_first_stage:
        x = model.tok_embeddings(input_ids)
    finite = bool(np.isfinite(x.asnumpy()).all())  # or else an earlier stage names the layer
    first, valid_T = None, model.valid_tokens(input_ids)
    numbers = stage_layers(network.config, mesh.grid.pipeline_stage, mesh.stage)
    for number, layer in zip(numbers, model.layers, strict=True):
        x = layer(x, valid_T, model.cos, model.sin, positions, segment_ids)[0]
        if finite and not np.isfinite(x.asnumpy()).all():
            first, finite = number, False
    beside.pass_on(x)
    return first
