"""Memory and time of a run that answers: what is counted is what is there."""

from pathlib import Path

import pytest

from mixtral_ms.cli.support.check_config_report import describe
from mixtral_ms.config import load_config
from mixtral_ms.config.loading.resolve import effective_parallel
from mixtral_ms.infer.runners.infer_weights import empty_weights
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.planner.predict_layouts import judge_prediction, plan_prediction
from mixtral_ms.parallel.planner.predict_memory import predict_memory, stored_weights
from mixtral_ms.parallel.planner.predict_time import experts_met, token_step
from mixtral_ms.parallel.planner.time_model import Cluster

ROOT = Path(__file__).parents[3]
BIG = ROOT / "research/mixtral_8x7b/predict_mixtral-8x7b.yaml"
TINY = ROOT / "research/mixtral_tiny/predict_mixtral-tiny.yaml"
TWO_RANKS = ("use_parallel=True", "parallel_config.model_parallel=2")
CLUSTER = Cluster(devices=2, memory=57.6 * 2**30)


@pytest.mark.parametrize("weight_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("experts", [1, 2])
def test_weights_are_counted_as_they_are_stored(weight_dtype, experts):
    grid = (*TWO_RANKS, f"parallel_config.expert_parallel={experts}")
    config = load_config(TINY, [*grid, f"weight_dtype={weight_dtype}"])
    mesh = Mesh(effective_parallel(config), 1)
    weights = empty_weights(config.model.model_config, weight_dtype, mesh)
    arrays = [*weights.tensors.values(), *weights.scales.values()]
    assert predict_memory(config).weights == sum(one.nbytes for one in arrays)


def on_ascend(*overrides):
    return load_config(BIG, ["parallel_config.model_parallel=2", *overrides])


def test_the_cache_is_all_blocks_in_the_dtype_it_has():
    positions = 512 * 16 * 32 * 2 * 4 * 128  # blocks, layers, keys and values, a half of the heads
    assert predict_memory(on_ascend("weight_dtype=float16")).cache == 2 * positions
    on_cpu = on_ascend("weight_dtype=float16", "context.device_target=CPU")
    assert predict_memory(on_cpu).cache == 4 * positions
    fewer = on_ascend("weight_dtype=float16", "model.model_config.num_blocks=256")
    assert predict_memory(fewer).cache == positions


def test_casts_are_of_one_layer_where_weights_are_stored_otherwise():
    layer = (8 * 3 * 14336 * 4096 + 2 * 4096 * (4096 + 1024)) // 2
    assert predict_memory(on_ascend("weight_dtype=int8")).casts == 2 * layer
    assert predict_memory(on_ascend("weight_dtype=float16")).casts == 0
    assert predict_memory(on_ascend("weight_dtype=float32")).casts == 0
    # C++, on one process of a CPU, casts nothing; graphs of several do
    assert predict_memory(load_config(TINY, ["weight_dtype=int8"])).casts == 0
    assert predict_memory(load_config(TINY, [*TWO_RANKS, "weight_dtype=int8"])).casts > 0


def test_a_step_reads_the_experts_that_its_tokens_met():
    config = on_ascend("weight_dtype=float16")
    assert experts_met(config, 1) == 2 / 8
    assert experts_met(config, 2) == pytest.approx(1 - (6 / 8) ** 2)
    spread = on_ascend("weight_dtype=float16", "parallel_config.expert_parallel=2")
    assert experts_met(spread, 1) == 2 / 8
    apart = on_ascend(
        "weight_dtype=float16",
        "parallel_config.model_parallel=8",
        "parallel_config.expert_parallel=8",
    )
    assert experts_met(apart, 1) == 1  # the busiest rank has one expert, and it is met
    weights, step = stored_weights(config), token_step(config, CLUSTER, 1)
    assert step.weight_bytes == weights.others + weights.experts / 4
    assert step.weights == step.weight_bytes / CLUSTER.memory_bandwidth
    assert step.bound_by == "weights" and step.casts == 0
    assert token_step(on_ascend("weight_dtype=int8"), CLUSTER, 1).bound_by == "casts"


def test_layouts_that_fit_come_first_and_the_others_say_how_large_they_are():
    plan = plan_prediction(on_ascend(), CLUSTER, {"expert_parallel": 1})
    assert [one.config.weight_dtype for one in plan.fitting] == ["float16", "int8"]
    assert [one.config.weight_dtype for one in plan.too_large] == ["float32"]
    one = judge_prediction(on_ascend("weight_dtype=float16"), CLUSTER)
    assert one.memory == plan.fitting[0].memory and one.batch == plan.fitting[0].batch
    few = plan_prediction(on_ascend(), Cluster(devices=3, memory=1e12))
    assert not few.fitting and any("divisible" in reason for reason in few.refused)


def test_check_config_says_what_fits():
    assert "each rank needs 87.9 GiB, but context.max_device_memory is 58GB" in describe(
        on_ascend()
    )
    said = describe(on_ascend("weight_dtype=float16"))
    assert "max_device_memory is" not in said and "44.4 GiB" in said
