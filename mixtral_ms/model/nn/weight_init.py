"""Initial weights that depend on the seed, the parameter's name and the place in it alone.

So a run starts from the same weights on every layout. A large tensor is drawn in tiles, each with a
generator of its own: a rank draws the tiles that it has a part of, and no others.
"""

import math
import zlib

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.threaded.parallel_blocks import parallel_for
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.placement import Region
from mixtral_ms.parallel.grid.sharding_rules import (
    adapter_shapes,
    parameter_shapes,
    placement_on_stage,
)

_ONE_TILE = 1 << 23  # values; what has no more is drawn as a whole, by one generator
_TILE = (256, 256)  # divides the parts that 8 ranks have of 14336 and of 4096


def initialize(
    network: nn.Cell, config: MixtralConfig, seed: int, mesh: Mesh, *, adapters_only: bool = False
) -> None:
    """Fill every parameter: norms with 1, biases with 0, weights from normal(0, init std).

    Of an adapter, A as peft does, B with 0: it begins by changing nothing. A rank draws its part of
    what one process would begin with.

    Args:
        network: whose parameters are filled.
        config: its sizes.
        seed: of the run.
        mesh: this rank among those that have a part of the network.
        adapters_only: leave the weights as they are: they come from a file.
    """
    adapters = adapter_shapes(config)
    shapes = adapters if adapters_only else parameter_shapes(config) | adapters
    for parameter in network.get_parameters():
        name = parameter.name
        if name in shapes:
            shape = shapes[name]
            placement = placement_on_stage(name, len(shape), mesh.grid)
            region = placement.region(shape, mesh.rank % mesh.stage_size)
            value = initial_part(name, shape, region, config.init_method_std, seed)
            parameter.set_data(Tensor.from_numpy(value))


def initial_part(
    name: str, shape: tuple[int, ...], region: Region, std: float, seed: int
) -> np.ndarray:
    """The float32 initial value of a region of one parameter, whose whole has this shape."""
    kind = row_of(name).initial
    sizes = tuple(len(range(length)[own]) for length, own in zip(shape, region, strict=True))
    if kind in ("ones", "zeros") or 0 in sizes:
        return np.full(sizes, kind == "ones", np.float32)
    # a matrix: what stands before the last axis are its rows, of which these are the region's
    height, width = math.prod(shape[:-1]), shape[-1]
    rows = np.arange(height).reshape(shape[:-1])[region[:-1]].reshape(-1)
    first, last, _ = region[-1].indices(width)
    part = np.empty((len(rows), last - first), np.float32)
    tile_height, tile_width = (height, width) if height * width <= _ONE_TILE else _TILE
    across = -(-width // tile_width)

    def draw(tile: tuple[int, int]) -> None:
        top, left = tile[0] * tile_height, tile[1] * tile_width
        size = min(tile_height, height - top), min(tile_width, width - left)
        key = (seed, zlib.crc32(name.encode()), tile[0] * across + tile[1])
        values = _draw(np.random.default_rng(key), kind, size, std, width)
        begin, end = np.searchsorted(rows, (top, top + tile_height))
        own = slice(max(first, left), min(last, left + tile_width))
        inside = values[rows[begin:end] - top, own.start - left : own.stop - left]
        part[begin:end, own.start - first : own.stop - first] = inside

    beside = range(first // tile_width, -(-last // tile_width))
    parallel_for(
        draw, [(int(down), at) for down in np.unique(rows // tile_height) for at in beside]
    )
    return part.reshape(sizes)


def _draw(
    generator: np.random.Generator, kind: str, size: tuple[int, int], std: float, inputs: int
) -> np.ndarray:
    if kind == "uniform":  # kaiming uniform with a = sqrt(5), as peft draws it
        return (2 * generator.random(size, np.float32) - 1) / np.float32(inputs**0.5)
    return generator.standard_normal(size, dtype=np.float32) * np.float32(std)
