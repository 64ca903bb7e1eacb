"""How often the host reads a tensor in a training step, beside what its graphs need.

Counted, not derived: the step's own code runs on a network of the same layers and tiny widths, with
zeros in place of what its graphs compute, and every read is seen.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mindspore import Tensor

from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.config.sections.fields import Dtype
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.graphs.pretended_device import replaced
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_network, build_optimizer, build_train_step
from mixtral_ms.train.step.train_step import TrainStep

_READS = ("asnumpy", "item", "tolist", "__float__", "__int__", "__bool__", "__index__")


def reads_of_step(config: RunConfig, rank: int) -> int:
    """Times that the host waits for a tensor's values in one step.

    Args:
        config: the run, with all of its layers.
        rank: which rank's step.
    """
    config = _tiny(config)
    mesh = Mesh(effective_parallel(config), rank)  # without groups: what is sent is only counted
    network = build_network(config, mesh, values="none")
    optimizer = build_optimizer(config, network)
    step = build_train_step(config, network, optimizer)
    zeros = [Tensor(np.zeros(one.shape, np.float32)) for one in network.trainable_params()]
    outputs = [_parts(step)] * step.accumulation
    ids_BS = np.zeros((1, config.model.model_config.seq_length), np.int32)
    with (
        replaced(step, "_gradients", lambda *_: (outputs, zeros)),
        replaced(optimizer.kernels, "operator", lambda *_: None),  # only the device has it
        counted_reads() as count,
    ):
        step([Batch(ids_BS, ids_BS)] * step.accumulation, learning_rate=0.0)
    return count()


def _parts(step: TrainStep) -> tuple[Tensor, ...]:
    """Zeros, as what `Objective.stage_parts` gives of a micro batch."""
    network = step.network
    layers, experts = len(network.model.layers), network.config.moe_config.expert_num
    shapes = [()] * step.objective.part_count + [(layers,)] * 2 + [(layers, experts)]
    shapes += [(layers,)] * 2
    return tuple(Tensor(np.zeros(shape, np.float32)) for shape in shapes)


@contextlib.contextmanager
def counted_reads() -> Iterator[Callable[[], int]]:
    """Counts reads of tensors by the host; gives a function that tells how many there were."""
    seen, inside = 0, False

    def counting(read: Callable) -> Callable:
        def read_and_count(*args: Any, **keywords: Any) -> Any:
            nonlocal seen, inside
            outer, inside = inside, True
            seen += not outer  # one way to read calls another
            try:
                return read(*args, **keywords)
            finally:
                inside = outer

        return read_and_count

    with contextlib.ExitStack() as stack:
        for name in _READS:
            if hasattr(Tensor, name):
                stack.enter_context(replaced(Tensor, name, counting(getattr(Tensor, name))))
        yield lambda: seen


def _tiny(config: RunConfig) -> RunConfig:
    """The same layers, parameters and ranks, every width as small as the ranks allow.

    With float16 for bfloat16, which a CPU does not have.
    """
    grid, model = effective_parallel(config), config.model.model_config
    width = 8 * grid.model_parallel
    dtype: Dtype = "float32" if model.compute_dtype == "float32" else "float16"
    small = dataclasses.replace(
        model,
        hidden_size=width,
        num_heads=grid.model_parallel,
        n_kv_heads=grid.model_parallel,
        head_dim=8,
        intermediate_size=width,
        vocab_size=width,
        seq_length=width * grid.context_parallel,
        compute_dtype=dtype,
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_config=small))
