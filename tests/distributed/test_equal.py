"""Training on several processes gives the losses, norms and gradients of one process."""

from dataclasses import replace

import numpy as np
import pytest
from distributed.cases import CASES, STEPS, TOLERANCE
from helpers.distributed import Case, References, largest_errors


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def check(tmp_path, references, report_error):
    def run(case, steps):
        folder = tmp_path / "job"
        for model, kinds in largest_errors(case, folder, references, steps).items():
            for kind, (error, where) in kinds.items():
                report_error(f"{case.grid_text} {model} {kind} {where}", error, TOLERANCE)
                assert error <= TOLERANCE, f"{model}, {where}: {error:.1e}"
        return folder

    return run


def test_other_rows_experts_spread_and_moments_cut(check):
    check(Case("dp=2,ep=2,zero=1", ("sdrop",), accumulation=2, evaluate=True), steps=2)


def test_heads_and_layers_split(check):
    case = Case("mp=2,pp=2", ("tied",), sequence_parallel=True, accumulation=2, evaluate=True)
    folder = check(case, steps=2)
    for rank in range(case.processes):  # each of them names what is wrong on the last stage
        output, weight = np.load(folder / f"tied.rank_{rank}.npz")["found"]
        assert output == "the output of model.layers.1"
        assert weight == "the weight model.layers.1.ffn_norm.weight itself"


def test_totals_on_the_device_and_gradients_in_buckets(check):
    """With buckets of which some gradients fill one, some share one and some are larger."""
    choices = {"one_host_read": True, "bucket_bytes": 8 << 10}
    check(Case("dp=2,ep=2,zero=1", ("sdrop",), accumulation=2, evaluate=True, choices=choices), 2)


@pytest.mark.long
def test_sums_of_gradients_that_are_cut_in_every_micro_batch(check):
    """The embedding's ends are added to each other at the end of the step only."""
    choices = {"cut_sums": True, "bucket_bytes": 8 << 10}
    case = Case("dp=2,pp=2,zero=1", ("tied",), accumulation=2, choices=choices)
    check(case, 2)


ASCEND_SIZES = {"hidden_size": 64, "head_dim": 16}
"""Attention on Ascend takes heads of a multiple of 16."""


@pytest.mark.parametrize(
    "case",
    [
        Case("dp=2,ep=2", ("dropless",)),
        pytest.param(Case("dp=2,ep=2,zero=1", ("sdrop",), accumulation=2), marks=pytest.mark.long),
        pytest.param(Case("mp=2,ep=2", ("dropless", "kdrop")), marks=pytest.mark.long),
        pytest.param(Case("mp=2", sequence_parallel=True), marks=pytest.mark.long),
        pytest.param(Case("mp=2,pp=2", accumulation=4), marks=pytest.mark.long),
        pytest.param(Case("cp=2"), marks=pytest.mark.long),
        pytest.param(Case("dp=2,mp=2,ep=2", accumulation=2), marks=pytest.mark.long),
    ],
    ids=lambda case: case.grid_text,
)
def test_as_ascend_does_it(case, check):
    """Its operators and collectives emulated, against one process with the CPU's."""
    check(replace(case, emulate=True, changes=ASCEND_SIZES), steps=2)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_every_layout(name, check):
    check(CASES[name], STEPS)
