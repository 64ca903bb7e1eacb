"""The step as it is carried out on Ascend, with its operators emulated, and the plain one."""

import numpy as np
import pytest
from helpers.ascend_emulation import emulate_ascend
from helpers.tiny import random_ids, shifted, tiny_config

from mixtral_ms.config.loading.step_choices import StepChoices
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.kernels.ascend.fused_adamw import FusedUpdate
from mixtral_ms.kernels.cells.optimizer_update import PlainUpdate
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.train_step import TrainStep
from mixtral_ms.train.step.working_weights import WorkingWeights

CONFIG = tiny_config(
    num_layers=1,
    hidden_size=32,
    num_heads=2,
    n_kv_heads=2,
    head_dim=16,
    compute_dtype="float16",
    moe_config={"expert_num": 4, "capacity_factor": 1.1, "aux_loss_factor": 0.1},
)
STEPS, MICRO_BATCHES = 2, 2


def trained(kernels, choices, *, working):
    """Losses, norms and weights."""
    network = MixtralForCausalLM(CONFIG, seed=1, backend="ascend")
    optimizer = AdamW(network.trainable_params(), eps=1e-2, weight_decay=0.1)
    optimizer.kernels, copied = kernels, None
    if working:
        twin = MixtralForCausalLM(CONFIG, share=network, backend="ascend")
        copied = WorkingWeights(network, twin)
    step = TrainStep(network, optimizer, MICRO_BATCHES, 0.05, choices=choices, working=copied)
    ids = [random_ids(CONFIG, seed, CONFIG.batch_size) for seed in range(MICRO_BATCHES)]
    batches = [Batch(one, shifted(one)) for one in ids]
    results = [step(batches, 0.003, 64.0) for _ in range(STEPS)]
    numbers = {"losses": np.array([one.loss for one in results])}
    numbers |= {"norms": np.array([one.grad_norm for one in results])}
    return numbers | {p.name: p.asnumpy() for p in network.trainable_params()}


@pytest.mark.slow
def test_all_that_a_device_does_otherwise(graph, monkeypatch, record_error):
    emulate_ascend(monkeypatch)
    expected = trained(PlainUpdate(), StepChoices(), working=False)
    choices = StepChoices(one_host_read=True, bucket_bytes=1 << 12)
    got = trained(FusedUpdate(), choices, working=True)
    assert got["losses"][1] < got["losses"][0]
    for name, value in got.items():
        record_error(name, value, expected[name], 1e-5)
