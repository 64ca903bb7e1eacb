"""How decoder layers are shared out over pipeline stages."""

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError


def layers_per_stage(config: MixtralConfig, stages: int) -> list[int]:
    """How many decoder layers each pipeline stage holds.

    `config.offset` as a list is added to the even share num_layers // stages; with one stage it
    has no meaning and is not read.

    Raises:
        UserError: the layers cannot be shared out so.
    """
    if stages == 1:
        return [config.num_layers]
    if config.num_layers < stages:
        raise UserError(
            f"model_config.num_layers {config.num_layers} is less than parallel_config."
            f"pipeline_stage {stages}: a stage would have no layer; take at most "
            f"{config.num_layers} stages"
        )
    share, left = divmod(config.num_layers, stages)
    offsets = config.offset if isinstance(config.offset, list) else [config.offset] * stages
    if len(offsets) != stages or sum(offsets) != left:
        example = [0] * (stages - 1) + [left]
        raise UserError(
            f"model_config.num_layers {config.num_layers} over parallel_config.pipeline_stage "
            f"{stages} leaves {left} over, but model_config.offset {config.offset} adds up to "
            f"{sum(offsets)} over {len(offsets)} stages: set offset: {example}, for example"
        )
    counts = [share + offset for offset in offsets]
    if min(counts) < 1:
        raise UserError(
            f"model_config.num_layers {config.num_layers} with offset {config.offset} leaves a "
            f"stage of parallel_config.pipeline_stage {stages} without a layer: {counts}"
        )
    return counts


def stage_layers(config: MixtralConfig, stages: int, stage: int) -> range:
    """Numbers of the decoder layers that a pipeline stage holds.

    Raises:
        UserError: the layers cannot be shared out so.
    """
    counts = layers_per_stage(config, stages)
    begin = sum(counts[:stage])
    return range(begin, begin + counts[stage])


def keeps_layer_inputs(grid: ParallelConfig, stage: int) -> bool:
    """Whether a stage computes each layer again from its input, which it kept, and no more often.

    The last stage goes back as soon as it went forward: there is nothing to be kept.
    """
    return grid.stage_keeps == "layer_inputs" and stage < grid.pipeline_stage - 1
