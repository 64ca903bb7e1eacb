"""What each rank of a grid has of the network; no processes are needed to see that."""

import numpy as np
import pytest
from helpers.sharded import local_parameter_shapes
from helpers.tiny import tiny_config

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.grid_text import format_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import (
    parameter_shapes,
    placement_on_stage,
)

GRIDS = [
    ParallelConfig(model_parallel=2),
    ParallelConfig(model_parallel=2, vocab_emb_dp=False),
    ParallelConfig(data_parallel=2, expert_parallel=2),
    ParallelConfig(model_parallel=4, expert_parallel=2),
    ParallelConfig(data_parallel=2, model_parallel=2, expert_parallel=4),
    ParallelConfig(pipeline_stage=2, context_parallel=2),
    ParallelConfig(data_parallel=2, model_parallel=2, pipeline_stage=2, expert_parallel=2),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: format_grid(grid, zero=False))
def test_ranks_begin_with_their_parts_of_one_process_s_network(grid, tied):
    config = tiny_config(num_heads=4, n_kv_heads=4, vocab_size=64, tie_word_embeddings=tied)
    shapes = parameter_shapes(config)
    whole = {p.name: p.asnumpy() for p in MixtralForCausalLM(config, seed=3).get_parameters()}
    for rank in range(Mesh(grid).world_size):
        mesh = Mesh(grid, rank)
        network = MixtralForCausalLM(config, seed=3, mesh=mesh)
        parts = {p.name: p.asnumpy() for p in network.get_parameters()}
        expected = local_parameter_shapes(config, grid, mesh.stage)
        assert {name: part.shape for name, part in parts.items()} == expected
        for name, part in parts.items():
            placement = placement_on_stage(name, part.ndim, grid)
            region = placement.region(shapes[name], rank % mesh.stage_size)
            np.testing.assert_array_equal(part, whole[name][region])


def test_ranks_of_a_mesh():
    grid = ParallelConfig(data_parallel=2, model_parallel=2, pipeline_stage=2, context_parallel=2)
    mesh = Mesh(grid, 13)  # stage 1, data 1, context 0, tensor 1
    assert (mesh.stage, mesh.data_index, mesh.context_index, mesh.tensor_index) == (1, 1, 0, 1)
    assert mesh.world.ranks == tuple(range(16))
    assert mesh.tensor.ranks == (12, 13)
    assert mesh.context.ranks == (13, 15)
    assert mesh.tokens.ranks == (9, 11, 13, 15)
    assert mesh.tokens.index == 2
    assert mesh.beside(0) == 5
    assert mesh.pair(mesh.beside(0)).ranks == (5, 13)


@pytest.mark.parametrize(
    ("experts", "exchange", "copies", "part"),
    [
        (2, (4, 6), (0, 4), 0),  # two copies of the experts, over two data-parallel ranks each
        (4, (0, 2, 4, 6), (4,), 2),
        (8, (0, 2, 4, 6), (4,), 4),  # over the tensor-parallel ranks too
    ],
)
def test_expert_ranks_of_a_mesh(experts, exchange, copies, part):
    grid = ParallelConfig(data_parallel=4, model_parallel=2, expert_parallel=experts)
    mesh = Mesh(grid, 4)
    assert mesh.exchange.ranks == exchange
    assert mesh.expert_copies.ranks == copies
    assert mesh.expert_part == part
