"""Stages that keep their layers' inputs give, to the bit, what stages computed again give."""

import mindspore
import numpy as np
import pytest
from helpers.lora import EVERYTHING, pet
from helpers.tiny import random_ids, shifted, tiny_config
from mindspore import Tensor

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.step.pipeline_gradients import PipelineGradients

ROUTER = {"aux_loss_factor": 0.5, "z_loss_factor": 0.1, "capacity_factor": 0.6}


def of_stage(stage, keeps, pet_config=None):
    """A micro batch forwards and back on one of 3 stages: output, parts, gradients; what was kept.

    Rows hold packed samples and padding, tokens are dropped.
    """
    grid = ParallelConfig(pipeline_stage=3, micro_batch_num=3, stage_keeps=keeps)
    config = tiny_config(num_layers=6, moe_config=ROUTER, pet_config=pet_config)
    network = MixtralForCausalLM(config, seed=1, mesh=Mesh(grid, stage))
    network.set_train()
    generator = np.random.default_rng(0)
    for parameter in network.trainable_params():  # adapters would begin as zeros
        values = generator.normal(0, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(values))
    ids = random_ids(config)
    ids[0, -3:] = 0
    gradients = PipelineGradients(CausalLMObjective(network), 3, {})
    batch = Batch(ids, shifted(ids), np.tile(np.arange(16, dtype=np.int32) // 5, (2, 1)))
    (backward, given), (forward, inputs) = gradients.graphs(batch).items()
    shape = (2, 16, config.hidden_size)
    hidden, dy = (Tensor(generator.normal(size=shape).astype(np.float32)) for _ in range(2))
    hidden = hidden if stage else inputs[0]
    out, *kept = forward(hidden, *inputs[1:])
    assert [one.shape for one in kept] == [one.shape for one in given[4 : 4 + len(kept)]]
    weights = Tensor(0.2, mindspore.float32), Tensor(0.3, mindspore.float32)
    backward.sums.clear()
    parts, dx = backward(hidden, dy, *weights, *kept, *inputs[1:])
    tensors = {"output": out, "dx": dx, **{f"part {n}": one for n, one in enumerate(parts)}}
    tensors |= {one.name: one for one in backward.sums.values}
    return {name: one.asnumpy() for name, one in tensors.items()}, kept


def require_equal(stage, pet_config=None):
    again, nothing = of_stage(stage, "stage_input", pet_config)
    layers, kept = of_stage(stage, "layer_inputs", pet_config)
    assert nothing == []
    assert len(kept) == 1 + 4  # the second layer's input, scores and counts of the routers
    for name, expected in again.items():
        np.testing.assert_array_equal(layers[name], expected, err_msg=name)
    sums = [value for name, value in layers.items() if name.startswith("grad_sum")]
    assert len(sums) > 10
    assert all(value.any() for value in sums)


@pytest.mark.slow
def test_a_stage_in_the_middle(graph):
    require_equal(1)


@pytest.mark.long
def test_the_first_stage_with_adapters(graph):
    require_equal(0, pet(EVERYTHING))
