"""The network that a checkpoint's tensors are of, and where a rank grid puts them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo, TensorSource
from mixtral_ms.checkpoint.shards.assemble import Strategies
from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.derived.parameter_table import (
    EMBEDDING,
    EXPERT_GATE,
    KEY,
    LM_HEAD,
    OUTPUT_BIAS,
    QUERY,
    QUERY_BIAS,
    layer_of,
)
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.sharding_rules import (
    parameter_of,
    parameter_shapes,
    placement_on_stage,
    placements,
)

Shape = tuple[int, ...]


def network_of(shapes: Mapping[str, Shape], known: MixtralConfig | None = None) -> MixtralConfig:
    """The sizes of the network that has these parameters.

    How the width of attention goes into heads does not show in shapes, nor does `offset`; both are
    `known`'s. Nothing about where tensors are depends on the heads.

    Args:
        shapes: of every parameter, under our names.
        known: the network as a configuration says it, if there is one.

    Raises:
        UserError: they are not a network's, or not the known one's; the first tensor is named.
    """
    if known is None:
        known = _inferred(shapes)
    expected = parameter_shapes(known)
    for name in {**expected, **shapes}:
        if (wanted := expected.get(name)) != (found := shapes.get(name)):
            raise UserError(
                f"{name} {_says(found)} in the checkpoint, {_says(wanted)} in the network of "
                f"{known.num_layers} layers, hidden_size {known.hidden_size}, "
                f"{known.moe_config.expert_num} experts"
            )
    return known


def shape_contradiction(infos: Mapping[str, TensorInfo]) -> str | None:
    """A tensor of our network whose shape does not go with the others', as text."""
    shapes = parameter_shapes_of(infos)
    try:
        expected = parameter_shapes(_inferred(shapes))
    except UserError:
        return None  # not our network, or only some of its tensors
    for name, shape in shapes.items():
        if expected.get(name, shape) != shape:
            return (
                f"{name} has the shape {list(shape)}, by the other tensors it would be "
                f"{list(expected[name])}"
            )
    return None


def _says(shape: Shape | None) -> str:
    return "is missing" if shape is None else f"has shape {list(shape)}"


def _inferred(shapes: Mapping[str, Shape]) -> MixtralConfig:
    layers = {layer for name in shapes if (layer := layer_of(name)) is not None}
    try:
        vocabulary, hidden = shapes[EMBEDDING.name]
        query, key_value = (shapes[row.at(0)][0] for row in (QUERY, KEY))
        experts, width, _ = shapes[EXPERT_GATE.at(0)]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"a rank grid is for checkpoints of this network under its own names, but {error} is "
            "not among the tensors: give a strategy file instead, or convert the checkpoint first"
        ) from error
    return MixtralConfig(
        num_layers=max(layers) + 1,
        hidden_size=hidden,
        vocab_size=vocabulary,
        num_heads=query,
        n_kv_heads=key_value,
        head_dim=1,
        intermediate_size=width,
        qkv_has_bias=QUERY_BIAS.at(0) in shapes,
        attn_proj_has_bias=OUTPUT_BIAS.at(0) in shapes,
        tie_word_embeddings=LM_HEAD.name not in shapes,
        moe_config=MoEConfig(expert_num=experts),
    )


def is_counter(info: TensorInfo) -> bool:
    """Whether a tensor is a single number such as global_step, which is not a parameter."""
    return info.shape in ((), (1,))


def parameter_shapes_of(infos: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Shapes of the parameters, without moments and counters."""
    return {
        name: info.shape
        for name, info in infos.items()
        if parameter_of(name) == name and not is_counter(info)
    }


def grid_strategies(
    infos: Mapping[str, TensorInfo],
    grid: ParallelConfig,
    zero: bool,
    known: MixtralConfig | None = None,
) -> Strategies:
    """Where a rank grid puts the tensors of a whole checkpoint.

    Args:
        infos: with global shapes.
        grid: sizes of the grid.
        zero: cut optimizer moments over replicas.
        known: the network as a configuration says it.

    Raises:
        UserError: the grid does not divide the network.
    """
    config = network_of(parameter_shapes_of(infos), known)
    names = [name for name, info in infos.items() if not is_counter(info)]
    return placements(config, grid, names, zero=zero)


def source_strategies(
    path: Path,
    ranks: Sequence[TensorSource],
    text: str,
    flag: str,
    known: MixtralConfig | None = None,
) -> Strategies:
    """Where a rank grid has put the tensors of a sharded checkpoint.

    Args:
        path: what the user named.
        ranks: the tensors of each rank.
        text: the grid, `dp=2,mp=4`.
        flag: that named it.
        known: the network as a configuration says it.

    Raises:
        UserError: the parts are not those of this grid.
    """
    grid, zero = parse_grid(text, flag)
    world = math.prod(expert_matrix(grid)) * grid.pipeline_stage
    if world != len(ranks):
        raise UserError(
            f"{flag} {text} is for {world} devices, {path} holds the files of {len(ranks)}"
        )
    try:
        return _source_strategies(ranks, grid, zero, known)
    except UserError as error:
        raise UserError(f"{flag} {text} is not this checkpoint's strategy: {error}") from error


def _source_strategies(
    ranks: Sequence[TensorSource], grid: ParallelConfig, zero: bool, known: MixtralConfig | None
) -> Strategies:
    infos = {name: info for source in ranks for name, info in source.infos.items()}
    shapes = {
        name: placement_on_stage(name, len(shape), grid).global_shape(shape)
        for name, shape in parameter_shapes_of(infos).items()
    }
    config = network_of(shapes, known)
    names = [name for name, info in infos.items() if not is_counter(info)]
    return placements(config, grid, names, zero=zero)
