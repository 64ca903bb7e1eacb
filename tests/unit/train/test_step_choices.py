"""How a step is carried out follows from keys, and where they are empty from the device."""

import pytest
from helpers.runs import ROOT

from mixtral_ms.config import load_config
from mixtral_ms.config.loading.step_choices import StepChoices, step_choices
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.builders import build_network, build_optimizer, build_train_step
from mixtral_ms.train.step.totals import DeviceTotals, HostTotals

TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
LARGE = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
FLOAT16 = "model.model_config.compute_dtype=float16"


def test_empty_keys_follow_the_device():
    assert step_choices(load_config(TINY, [])) == StepChoices()
    assert step_choices(load_config(LARGE, ["context.device_target=CPU"])) == StepChoices()
    empty = "runner_wrapper.working_weights=null"  # the file says False, for want of memory
    assert step_choices(load_config(LARGE, [empty])) == StepChoices(True, True, True, 64 << 20)
    float32 = "model.model_config.compute_dtype=float32"
    assert not step_choices(load_config(LARGE, [empty, float32])).working_weights


@pytest.mark.parametrize("key", ["one_host_read", "working_weights"])
def test_keys_that_are_given_win(key):
    for yaml, given in ((TINY, True), (LARGE, False)):
        choices = step_choices(load_config(yaml, [f"runner_wrapper.{key}={given}", FLOAT16]))
        assert getattr(choices, key) == given


def test_sums_are_cut_where_moments_are():
    shard = "parallel.parallel_optimizer_config.gradient_accumulation_shard=True"
    assert step_choices(load_config(LARGE, [shard])).cut_sums
    assert not step_choices(load_config(LARGE, [])).cut_sums
    off = "parallel.enable_parallel_optimizer=False"
    assert not step_choices(load_config(LARGE, [shard, off])).cut_sums


def step_of(*changes):
    config = load_config(TINY, ["model.model_config.num_layers=1", *changes])
    network = build_network(config, Mesh(), values="none")
    return network, build_train_step(config, network, build_optimizer(config, network))


def test_the_step_is_built_as_its_keys_say(device):
    network, step = step_of()
    assert type(step.totals) is HostTotals and step.objective.network is network
    keys = ("runner_wrapper.one_host_read=True", "runner_wrapper.working_weights=True")
    network, step = step_of(FLOAT16, *keys)
    assert type(step.totals) is DeviceTotals and step.objective.network is not network


def test_working_weights_of_float32_are_none_and_said_to_be(device, capsys):
    network, step = step_of("runner_wrapper.working_weights=True")
    assert step.objective.network is network
    assert "runner_wrapper.working_weights True has no effect" in capsys.readouterr().err
