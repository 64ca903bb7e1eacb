"""A router policy of this test's own trains and predicts; who lacks it says so by name."""

import numpy as np
import pytest
from helpers.runs import final_tensors, metrics_of
from mindspore import Tensor, nn, ops

from mixtral_ms import MixtralForCausalLM, MoEConfig, Trainer, load_config
from mixtral_ms.config.sections.model_section import ROUTING_POLICIES
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners.base import RunnerUnavailableError, StepInput
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.infer.runners.select_runner import select_runner
from mixtral_ms.log import get_logger
from mixtral_ms.model.moe.router_policy import (
    ROUTER_POLICIES,
    RouterPolicy,
    add_router_policy,
    router_policy,
)

LENGTH, TOLERANCE = 12, 1e-4


class SigmoidShares(nn.Cell):
    """Each expert scored for itself, as a share of all scores."""

    def construct(self, logits_TE):
        scores_TE = ops.sigmoid(logits_TE)
        return scores_TE / ops.sum(scores_TE, 1, keepdim=True)


class SigmoidRouter(RouterPolicy):
    def scores(self):
        return SigmoidShares()


@pytest.fixture
def sigmoid():
    """The policy's name; there is such a policy for one test."""
    name = "SigmoidRouter"
    add_router_policy(name, SigmoidRouter)
    yield name
    del ROUTER_POLICIES[name]
    ROUTING_POLICIES.remove(name)


@pytest.fixture
def trained(sigmoid, graph, tiny_run, tmp_path):
    """The tiny run with that policy: its configuration, with weights in `output_dir`."""
    changes = (f"output_dir={tmp_path}", f"moe_config.routing_policy={sigmoid}", "do_eval=False")
    config = load_config(tiny_run / "run.yaml", changes)
    Trainer(config).train()
    return config


@pytest.fixture
def logged(caplog):
    """What the package's logger says, which it does not pass on to pytest's."""
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


def losses_of(output):
    return [record["loss"] for record in metrics_of(output) if record["kind"] == "train"]


def prompt(ids_T):
    positions_T = np.arange(len(ids_T), dtype=np.int32)
    starts, table_1M = np.array([0, len(ids_T)], np.int32), np.zeros((1, 1), np.int32)
    return StepInput(ids_T, positions_T, starts, table_1M, positions_T)


@pytest.mark.slow
def test_it_trains_and_predicts_where_there_is_such_a_policy(
    trained, tiny_run, logged, record_error
):
    losses = losses_of(trained.output_dir)
    assert losses[-1] < losses[0] != losses_of(tiny_run / "output")[0]

    config = trained.model.model_config
    network = MixtralForCausalLM(config, batch_size=1, seq_length=LENGTH)
    found = final_tensors(trained.output_dir)
    tensors = {one.name: found[one.name] for one in network.weights()}
    for one in network.weights():
        one.set_data(Tensor(tensors[one.name]))
    ids_T = np.random.default_rng(0).integers(0, config.vocab_size, LENGTH).astype(np.int32)
    wanted = network(Tensor(ids_T[None])).asnumpy()[0]

    weights = InferWeights("float32", tensors, {})
    with pytest.raises(RunnerUnavailableError, match="lacks .*routing_policy 'SigmoidRouter'"):
        select_runner(config, weights, 4, 16, backend="C++")
    runner = select_runner(config, weights, 4, 16)
    assert runner.name == "graph"
    why = "routing_policy 'SigmoidRouter': it has TopkRouterV2"
    assert [why in message for message in logged.messages].count(True) == 1
    record_error("logits", runner.step(prompt(ids_T)), wanted, TOLERANCE)


def test_an_unknown_policy_is_named_with_those_that_there_are(tiny_run):
    with pytest.raises(UserError, match=r"'TopkRouterV1': there are TopkRouterV2$"):
        router_policy(MoEConfig(routing_policy="TopkRouterV1"))
    changes = ["moe_config.routing_policy=TopkRouterV1"]
    with pytest.raises(UserError, match="one of TopkRouterV2.*did you mean TopkRouterV2"):
        load_config(tiny_run / "run.yaml", changes)


def test_a_policy_keeps_its_name_to_itself(sigmoid):
    with pytest.raises(ValueError, match="'SigmoidRouter' already"):
        add_router_policy(sigmoid, RouterPolicy)


def test_every_value_of_the_key_has_its_rule():
    assert list(ROUTER_POLICIES) == ROUTING_POLICIES
