"""The choice of what runs the network for generation."""

from mixtral_ms.config.derived.prediction import USUAL_BATCH
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners.base import Runner, RunnerUnavailableError
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.grid.mesh import Mesh

RUNNERS = ("auto", "C++", "graph")


def select_runner(
    config: MixtralConfig,
    weights: InferWeights,
    num_blocks: int | None = None,
    block_size: int | None = None,
    *,
    backend: str = "auto",
    mesh: Mesh | None = None,
    batch: int = USUAL_BATCH,
) -> Runner:
    """The C++ runner where it can be had, else a graph runner; the log says which.

    Over several ranks it is a graph runner: the paged one where the kernels have a paged cache.

    Args:
        config: the network's sizes.
        weights: its tensors.
        num_blocks: blocks of the cache; None takes `num_blocks` of the configuration.
        block_size: positions in a block; None takes `block_size` of the configuration.
        backend: "auto", or "C++" or "graph" for that one and no other.
        mesh: the ranks; None for one process.
        batch: most sequences that are answered at once.

    Raises:
        UserError: another backend.
        RunnerUnavailableError: "C++" was asked for by name and cannot be had.
    """
    if backend not in RUNNERS:
        raise UserError(f"runner {backend!r}: allowed are {', '.join(RUNNERS)}")
    num_blocks, block_size = num_blocks or config.num_blocks, block_size or config.block_size
    over_ranks = mesh is not None and mesh.world_size > 1
    if backend == "C++" and over_ranks:
        raise RunnerUnavailableError("the C++ runner is for one process")
    if backend in ("auto", "C++") and not over_ranks:
        from mixtral_ms.infer.runners.cpp_runner import CppRunner  # noqa: PLC0415 - it compiles

        try:
            return CppRunner(config, weights, num_blocks, block_size)
        except RunnerUnavailableError as error:
            if backend == "C++":
                raise
            get_logger().info("the C++ runner cannot be used: %s", error)
    # these import MindSpore
    from mixtral_ms.infer.runners.graph_runner import GraphRunner  # noqa: PLC0415
    from mixtral_ms.infer.runners.paged_runner import PagedRunner, open_cache  # noqa: PLC0415
    from mixtral_ms.kernels.select import select_kernels  # noqa: PLC0415

    kernels = select_kernels(dropless=True)
    cache = open_cache(config, weights, block_size, kernels, mesh)
    if cache is not None:
        return PagedRunner(config, weights, num_blocks, cache, kernels, batch, mesh)
    return GraphRunner(config, weights, num_blocks, block_size, mesh)
