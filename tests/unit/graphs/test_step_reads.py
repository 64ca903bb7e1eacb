"""The host's reads in a training step are counted where they happen."""

import mindspore
import numpy as np
import pytest
from helpers.runs import ROOT
from mindspore import Tensor

from mixtral_ms.config import load_config
from mixtral_ms.graphs.pretended_device import PretendedAscend
from mixtral_ms.graphs.step_reads import counted_reads, reads_of_step

TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"


def test_every_way_to_read_counts_once(device):
    x = Tensor(np.ones(1, np.float32))
    with counted_reads() as count:
        x.asnumpy()
        x.item()
        float(x)
        int(x)
        bool(x)
        x.tolist()
        assert count() == 6
        _ = x + 1
        assert count() == 6
    x.asnumpy()
    assert count() == 6


def reads(changes, yaml=TINY):
    with PretendedAscend(0).in_place():
        return reads_of_step(load_config(yaml, changes), 0)


@pytest.mark.usefixtures("pynative")
def test_a_step_reads_parts_norms_and_one_sum():
    layers = ["model.model_config.num_layers=2", "runner_config.gradient_accumulation_steps=1"]
    one = reads(layers)
    more = reads([*layers[:1], "runner_config.gradient_accumulation_steps=3"])
    assert more - one == 2 * 6, "the parts of every micro batch's loss"
    network = 2 * 10 + 3  # parameters of two layers, the embedding, the last norm and the head
    assert one == 6 + network, "and a norm of every parameter"


@pytest.mark.usefixtures("pynative")
def test_ranks_read_the_sum_over_them():
    layers = ["model.model_config.num_layers=2", "runner_config.gradient_accumulation_steps=1"]
    ranks = ["use_parallel=True", "parallel_config.data_parallel=2"]
    assert reads([*layers, *ranks]) == reads(layers) + 2, "tokens, and the totals"
    assert mindspore.get_context("device_target") == "CPU"


@pytest.mark.slow
@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["pretrain_mixtral-8x7b.yaml", "pretrain_mixtral-8x7b_32k.yaml"])
def test_on_ascend_the_host_reads_once(name):
    assert reads([], ROOT / "research/mixtral_8x7b" / name) == 1
