"""How each parameter is split over ranks, by its row in `config/derived/parameter_table.py`.

A parameter lives on the ranks of its pipeline stage; there it may be cut along one axis over the
tensor-parallel ranks and along another over the expert-parallel ranks (`config/derived/
expert_grid.py` says which those are). The network's local shapes, strategy files, resharding,
weight conversion and the memory plan all ask here.

Rank order is MindFormers': rank = (stage * data_parallel + data index) * model_parallel + tensor
index; context-parallel ranks lie between those two.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.derived.parameter_row import adapter_rows
from mixtral_ms.config.derived.parameter_table import (
    EMBEDDING,
    adapted_rows,
    layer_of,
    parameters_of,
    row_of,
)
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.placement import Placement

MOMENTS = ("adam_m.", "adam_v.")
"""What stands before a parameter's name in the names of its optimizer moments."""


def parameter_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter, in the network's order."""
    return {name: row.shape(config) for name, row in parameters_of(config)}


def adapter_shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every LoRA parameter that pet_config asks for, in the network's order."""
    return {
        adapter.at(layer): adapter.shape(config)
        for layer, row in adapted_rows(config.pet_config, config.num_layers)
        for adapter in adapter_rows(row)
    }


def parameter_count(config: MixtralConfig) -> int:
    """Number of trainable values: 46,702,792,704 for Mixtral 8x7B."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def active_parameter_count(config: MixtralConfig) -> int:
    """Values that one token meets: all but the experts that were not chosen for it."""
    moe = config.moe_config
    chosen = min(moe.num_experts_chosen, moe.expert_num)
    count = 0
    for name, shape in parameter_shapes(config).items():
        size = math.prod(shape)
        if row_of(name).expert_axis is not None:
            size = size * chosen // moe.expert_num
        count += size
    return count


def stages_of(name: str, config: MixtralConfig, stages: int) -> tuple[int, ...]:
    """The pipeline stages that hold a parameter; two for an embedding that is also the head."""
    row, layer, end = row_of(name), layer_of(name), 0
    if layer is None:
        tied = row is EMBEDDING and config.tie_word_embeddings and stages > 1
        if tied:
            return (0, stages - 1)
        return (0,) if row.stage == "first_stage" else (stages - 1,)
    for stage, count in enumerate(layers_per_stage(config, stages)):
        end += count
        if layer < end:
            return (stage,)
    raise UserError(f"{name!r}: there are only {config.num_layers} layers")


def local_shape(name: str, shape: tuple[int, ...], grid: ParallelConfig) -> tuple[int, ...]:
    """Shape of a parameter's part on one rank.

    Raises:
        UserError: an axis does not divide by the number of ranks it is cut over.
    """
    return _local_shape(name, shape, placement_on_stage(name, len(shape), grid), grid)


def placements(
    config: MixtralConfig, grid: ParallelConfig, names: Iterable[str], *, zero: bool
) -> dict[str, dict[int, Placement]]:
    """Where parameters and optimizer moments are: name -> pipeline stage -> placement.

    Args:
        names: of parameters, or of their moments: with one of MOMENTS in front.
        zero: cut the moments, not the parameters (ZeRO-1), over all replicas along axis 0. A moment
            that does not divide so stays whole.

    Raises:
        UserError: a name is in no row, or an axis does not divide.
    """
    shapes, result = parameter_shapes(config) | adapter_shapes(config), {}
    stages, ranks = grid.pipeline_stage, math.prod(expert_matrix(grid))
    for name in names:
        parameter = parameter_of(name)
        if parameter not in shapes:
            raise UserError(f"{name!r} is not a parameter of this network, nor a moment of one")
        shape = shapes[parameter]
        placement = placement_on_stage(parameter, len(shape), grid)
        local = _local_shape(parameter, shape, placement, grid)
        if zero and parameter != name:
            placement = _sharded(placement, local)
        result[name] = {
            stage: replace(placement, first_rank=stage * ranks)
            for stage in stages_of(parameter, config, stages)
        }
    return result


def parameter_of(name: str) -> str:
    """The parameter that a tensor belongs to: itself, or that of which it is a moment."""
    for prefix in MOMENTS:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def placement_on_stage(name: str, axes: int, grid: ParallelConfig) -> Placement:
    """How a parameter of so many axes lies on the ranks of the first stage."""
    row = row_of(name)
    tensor_map: list[tuple[int, ...]] = [()] * axes
    if row.tensor_axis is not None and not (row is EMBEDDING and grid.vocab_emb_dp):
        tensor_map[row.tensor_axis] = (0,)
    if row.expert_axis is not None:
        tensor_map[row.expert_axis] = (1,)
        return Placement(expert_matrix(grid), tuple(tensor_map))
    data = grid.data_parallel * grid.context_parallel
    return Placement((data, grid.model_parallel), tuple(tensor_map))


def _local_shape(
    name: str, shape: tuple[int, ...], placement: Placement, grid: ParallelConfig
) -> tuple[int, ...]:
    try:
        return placement.local_shape(shape)
    except UserError as error:
        raise UserError(
            f"{name}: {error} (parallel_config.model_parallel {grid.model_parallel}, "
            f"expert_parallel {grid.expert_parallel}, data_parallel {grid.data_parallel})"
        ) from error


def _sharded(placement: Placement, local_shape: tuple[int, ...]) -> Placement:
    """With an optimizer shard over all replicas, if the parts divide by them."""
    if placement.replicas == 1 or local_shape[0] % placement.replicas:
        return placement
    # the minor axes of the matrix do the cutting, so replicas are that many ranks apart
    step = math.prod(placement.cuts)
    return replace(placement, opt_shard_size=-1, opt_shard_step=step)
