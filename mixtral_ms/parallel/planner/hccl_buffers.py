"""What HCCL keeps on a device for the groups of ranks that a run makes."""

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.parallel.grid.mesh import Mesh

DEFAULT_MB = 200
"""HCCL's own size of a buffer, as its documentation of HCCL_BUFFSIZE says; each group has two."""


def hccl_buffers(grid: ParallelConfig) -> tuple[int, int]:
    """Groups of the rank that has most of them, and the bytes of their buffers.

    They lie outside the memory that MindSpore manages.
    """
    return max(_of_rank(grid, stage) for stage in range(grid.pipeline_stage))


def _of_rank(grid: ParallelConfig, stage: int) -> tuple[int, int]:
    """Of the first rank of a stage; the others of it have alike groups."""
    sizes: list[int] = []

    def make(ranks: tuple[int, ...], kind: str) -> str:
        given = getattr(grid.hccl_buffer_size, kind, None) if len(ranks) < world else None
        sizes.append(2 * (given or DEFAULT_MB) << 20)
        return kind

    world = Mesh(grid).world_size
    Mesh(grid, world // grid.pipeline_stage * stage, make).make_groups()
    return len(sizes), sum(sizes)
