"""Initial weights that depend on the seed and the parameter's name alone.

So a run starts from the same weights on every layout, and on every number of ranks.
"""

import zlib

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import (
    adapter_shapes,
    parameter_shapes,
    placement_on_stage,
)


def initialize(network: nn.Cell, config: MixtralConfig, seed: int, mesh: Mesh) -> None:
    """Fill every parameter: norms with 1, biases with 0, weights from normal(0, init std).

    Of an adapter, A as peft does, B with 0: it begins by changing nothing. A rank takes its part of
    what one process would begin with.
    """
    shapes = parameter_shapes(config) | adapter_shapes(config)
    for parameter in network.get_parameters():
        if parameter.requires_grad:
            name = parameter.name
            value = initial_value(name, shapes[name], config.init_method_std, seed)
            placement = placement_on_stage(name, value.ndim, mesh.grid)
            part = value[placement.region(value.shape, mesh.rank % mesh.stage_size)]
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(part)))


def initial_value(name: str, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
    """The float32 initial value of one parameter."""
    kind = row_of(name).initial
    if kind == "ones":
        return np.ones(shape, np.float32)
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if kind == "uniform":
        # kaiming uniform with a = sqrt(5), as peft draws it: bound = 1 / sqrt(inputs)
        return (2 * generator.random(shape, np.float32) - 1) / np.float32(shape[-1] ** 0.5)
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)
