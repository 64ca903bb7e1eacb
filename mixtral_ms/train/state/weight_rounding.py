"""A network with the weights that prediction would use, to see what their format costs."""

import numpy as np
from mindspore import Tensor

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.infer.runners.infer_weights import WeightDtype, load_weights
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.state.parameter_loading import own_regions


def round_weights(
    network: MixtralForCausalLM, source: TensorSource, weight_dtype: WeightDtype
) -> None:
    """Give the network a source's weights as `weight_dtype` holds them, back in float32.

    Raises:
        UserError: as `load_weights`.
    """
    weights = load_weights(source, network.config, weight_dtype)
    regions = own_regions(network, [one.name for one in network.trainable_params()])
    for parameter in network.trainable_params():
        values = weights.tensors[parameter.name].astype(np.float32)
        if parameter.name in weights.scales:
            values *= weights.scales[parameter.name][..., None]
        own = np.ascontiguousarray(values[regions[parameter.name]])
        parameter.set_data(Tensor.from_numpy(own))
