"""A process that compiles a rank's training graph for Ascend with MindSpore's front end.

The front end parses, infers every shape, differentiates and optimises, and stops before operators
are chosen: so it needs no device. Prints "built".
"""

import argparse

import mindspore
import numpy as np
from helpers.tiny import tiny_config
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.common.api import _cell_graph_executor
from mindspore.ops.operations import comm_ops

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.step.gradients import MicroBatchGradients


def pretend_ascend(rank: int) -> None:
    """MindSpore answers as on Ascend, and makes collectives of groups that nobody made."""
    real = mindspore.get_context
    mindspore.get_context = lambda key: "Ascend" if key == "device_target" else real(key)
    comm_ops._get_group = lambda group: group
    comm_ops.get_rank = lambda group: ranks_of(group).index(rank)
    comm_ops.get_group_size = lambda group: len(ranks_of(group))


def name_of(ranks: tuple[int, ...]) -> str:
    return "_".join(map(str, ranks))


def ranks_of(name: str) -> list[int]:
    return [int(rank) for rank in name.split("_")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", nargs="*", default=[], help="sizes, data_parallel=2 and the like")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--capacity_factor", type=float, default=-1.0)
    args = parser.parse_args()
    grid = ParallelConfig(**{k: int(v) for k, v in (one.split("=") for one in args.grid)})
    pretend_ascend(args.rank)
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    config = tiny_config(
        compute_dtype="bfloat16", moe_config={"capacity_factor": args.capacity_factor}
    )
    network = MixtralForCausalLM(config, mesh=Mesh(grid, args.rank, name_of)).set_train()
    assert network.kernel_name == "ascend"
    shape = (config.batch_size, config.seq_length // grid.context_parallel)
    ids = Tensor(np.ones(shape, np.int32))
    weight = Tensor(1.0, mstype.float32)
    graph = MicroBatchGradients(CausalLMObjective(network), accumulation=2).graph
    _cell_graph_executor.compile(
        graph,
        *(weight, weight, ids, None, None, ids),
        phase="export.mindir",
        do_convert=False,
        jit_config_dict={},
    )
    print("built")


if __name__ == "__main__":
    main()
