"""Which ranks the experts are spread over."""

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError


def exchange_ranks(grid: ParallelConfig) -> int:
    """Ranks with tokens of their own that exchange them for the experts each of them has."""
    return min(grid.expert_parallel, grid.data_parallel * grid.context_parallel)


def expert_matrix(grid: ParallelConfig) -> tuple[int, int, int]:
    """The ranks of a pipeline stage as the experts see them, row-major: (copies, parts, width).

    Experts are cut into `parts` = expert_parallel and the width of each over `width` ranks; this is
    there `copies` times. Parts are taken from the data-parallel (and context-parallel) ranks first
    and, where those are too few, from the model-parallel ranks, which leaves fewer for the width.

    Raises:
        UserError: the ranks do not divide so.
    """
    data, parts = grid.data_parallel * grid.context_parallel, grid.expert_parallel
    named = f"parallel_config.data_parallel {grid.data_parallel}"
    if grid.context_parallel > 1:
        named += f" * context_parallel {grid.context_parallel} = {data}"
    if parts <= data:
        if data % parts:
            raise UserError(
                f"{named} is not divisible by parallel_config.expert_parallel {parts}: experts are "
                "spread over those ranks"
            )
        return data // parts, parts, grid.model_parallel
    if parts % data:
        raise UserError(
            f"parallel_config.expert_parallel {parts} is more than {named} and not divisible by it"
        )
    taken = parts // data
    if grid.model_parallel % taken:
        raise UserError(
            f"parallel_config.expert_parallel {parts} is {taken} times {named}, but "
            f"parallel_config.model_parallel {grid.model_parallel} is not divisible by {taken}: "
            "experts are spread over data-parallel ranks first, then over model-parallel ones"
        )
    return 1, parts, grid.model_parallel // taken
