"""What the plan says a step of the shipped 8x7B run is made of."""

from pathlib import Path

import pytest

from mixtral_ms.config import load_config
from mixtral_ms.parallel.planner.layout_search import judge
from mixtral_ms.parallel.planner.time_model import Cluster
from mixtral_ms.train.report.flops import flops_per_token

BIG = Path(__file__).parents[3] / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"


def judged(*overrides):
    config = load_config(BIG, overrides)
    return judge(config, Cluster(16, 64 << 30), flops_of(config))


def flops_of(config):
    model = config.model.model_config
    return flops_per_token(model, model.seq_length)


@pytest.mark.parametrize(
    "recompute", ["recompute=True", "select_recompute=True", "recompute=False"]
)
def test_a_step_is_the_sum_of_its_parts(recompute):
    time = judged(f"recompute_config.{recompute}").time
    assert sum(time.exposed.values()) == pytest.approx(time.step)


def test_an_exchange_in_parts_is_hidden_but_for_the_first_and_last():
    parallel, degree = (
        "moe_config.comp_comm_parallel=True",
        "moe_config.comp_comm_parallel_degree={}",
    )
    one_stage = ("parallel_config.pipeline_stage=1", "parallel_config.data_parallel=16")
    whole = judged(*one_stage).time
    for parts in (2, 4):
        time = judged(*one_stage, parallel, degree.format(parts)).time
        shown, hidden = time.exposed["expert_parallel"], time.hidden["expert_parallel"]
        assert shown == pytest.approx(whole.exposed["expert_parallel"] / parts)
        assert shown + hidden == pytest.approx(whole.exposed["expert_parallel"])
        # each part reads the experts' weights, and has a gradient of its own
        more = time.exposed["weights"] - whole.exposed["weights"]
        assert time.step == pytest.approx(whole.step - hidden + more)
        assert more > 0
    dropless = judged(parallel, "moe_config.capacity_factor=-1").time
    assert dropless.hidden["expert_parallel"] == 0


def test_attention_alone_computed_again_lies_between():
    one_stage = ("parallel_config.pipeline_stage=1", "parallel_config.data_parallel=16")
    none, attention, layers = (
        judged(
            *one_stage,
            f"recompute_config.recompute={whole}",
            f"recompute_config.select_recompute={selected}",
        )
        for whole, selected in ((False, False), (False, True), (True, False))
    )
    assert none.time.step < attention.time.step < layers.time.step
    kept = [one.memory[0].activations for one in (none, attention, layers)]
    assert kept[0] > kept[1] > kept[2]
    # attention's projections and scores and the router, a forward of each; not the experts
    flops = flops_of(none.config)
    again = flops["total"] - flops["experts"] - flops["lm_head"]
    more = attention.time.exposed["products"] - none.time.exposed["products"]
    assert more == pytest.approx(4096 * none.micro_batches * again / 3 / (320e12 * 0.4))


def test_weights_are_moved_less_with_a_copy_that_is_cast_once():
    wrapper = "runner_wrapper.working_weights={}".format
    with_copy, without = (judged(wrapper(value)).time for value in (True, False))
    assert with_copy.exposed["weights"] < 0.75 * without.exposed["weights"]
