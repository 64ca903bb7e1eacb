"""Micro batches of padding alone, and steps without a target, spoil no figure."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.played import RESULT, played_run
from helpers.runs import make_run, metrics_of
from helpers.tiny import tiny_config
from mindspore import Tensor

from mixtral_ms.config import load_config
from mixtral_ms.config.sections.model_section import MoEConfig
from mixtral_ms.model.moe.router import RouterLosses
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.step.totals import Totals

ROUTED = (0.3, 0.1, [0.5, 0.25, 0.25, 0.0], 0.2, 1.3)
PADDING = (0.0, 0.0, [0.0] * 4, 0.0, 0.0)
MIXES = [
    # micro batches of a step, and what the routers' figures must be
    ([ROUTED], ROUTED),
    ([ROUTED] * 4, ROUTED),
    ([ROUTED] * 3 + [PADDING], ROUTED),
    ([PADDING, ROUTED, PADDING, PADDING], ROUTED),
    ([PADDING] * 4, PADDING),
]


@pytest.mark.parametrize(("micro_batches", "expected"), MIXES)
def test_figures_are_means_over_what_is_routed(micro_batches, expected):
    means = {}

    def taken(sums, router_sums, targets, parts):
        means.update(router=list(router_sums), targets=targets, parts=parts)
        return {"lm_loss": 0.0}

    network = SimpleNamespace(config=tiny_config(), mesh=Mesh())
    totals = Totals(SimpleNamespace(network=network, part_count=1, means=taken))
    for aux, z, load, dropped, entropy in micro_batches:
        layers = [np.array([one, one], np.float32) for one in (aux, z, dropped, entropy)]
        loads = np.array([load, load], np.float32)
        totals.add([np.array(2.0), layers[0], layers[1], loads, layers[2], layers[3]])
    result = totals.result(0, len(micro_batches), 1.0, False)
    np.testing.assert_allclose(result.expert_load, [expected[2]] * 2, rtol=1e-6)
    np.testing.assert_allclose(result.drop_percent, [100 * expected[3]] * 2, rtol=1e-6)
    np.testing.assert_allclose(result.router_entropy, [expected[4]] * 2, rtol=1e-6)
    # the losses are weighed by all micro batches, as their gradients are
    assert means["parts"] == len(micro_batches) and means["targets"] == 1
    routed = sum(one is ROUTED for one in micro_batches)
    np.testing.assert_allclose(means["router"], [2 * 0.3 * routed, 2 * 0.1 * routed], rtol=1e-6)
    assert result.tokens == 0


@pytest.mark.parametrize("kept", [0, 6, 8])
@pytest.mark.parametrize("assigned", [0, 8])
def test_of_padding_alone_nothing_is_dropped(pynative, kept, assigned):
    kept = min(kept, assigned)
    losses = RouterLosses(MoEConfig(expert_num=4, num_experts_chosen=2))
    ones = np.ones((1, 4, 4), np.float32)
    per_expert = (np.array([[n / 4] * 4], np.float32) for n in (assigned, kept))
    valid = np.full(4, assigned > 0)
    *_, dropped, _ = losses(Tensor(ones / 4), Tensor(ones), *map(Tensor, per_expert), Tensor(valid))
    assert dropped.asnumpy().tolist() == [1 - kept / assigned if assigned else 0.0]


def test_steps_without_a_target_are_said_once(tmp_path, capsys, device):
    make_run(tmp_path)
    given = ["do_eval=False", "callbacks.0.save_checkpoint_steps=100"]
    run = played_run(load_config(tmp_path / "run.yaml", given))
    played = run.step_fn

    def step_fn(*arguments):
        played(*arguments)
        empty = run.done + 1 in (3, 5)
        return SimpleNamespace(**{**vars(RESULT), "tokens": 0 if empty else 9})

    run.step_fn = step_fn
    run.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if "has no target" in line]
    assert len(lines) == 1 and "step 3 has no target" in lines[0]
    tokens = [record["tokens"] for record in metrics_of(tmp_path / "output")]
    assert tokens == [9, 9, 0, 9, 0, 9, 9, 9]
