"""Results keep what they say on their way between processes, and ranks are chosen as asked."""

import json

import pytest
from helpers.runs import ROOT

from mixtral_ms.config import load_config
from mixtral_ms.errors import UserError
from mixtral_ms.graphs.check_ranks import ranks_of
from mixtral_ms.graphs.graph_facts import Collective, Constant, Dynamic, GraphFacts
from mixtral_ms.graphs.results import GraphResult, RankJob, RankResult, from_data, plain_data

BIG = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
FACTS = GraphFacts(
    {"Add": 3},
    [Dynamic("AlltoAllV", 5, "a.py:1")],
    {"AlltoAllV": 5},
    Constant(8, "Bool", (2, 4), "Add"),
    [Collective("AllGather", "ranks_0_1", "Int32", 2, 64)],
)


@pytest.mark.parametrize(
    "value",
    [
        RankJob("a.yaml", ("seed=1",), 3, 1, "kept"),
        RankResult(1, 2, layers=16, error="why", lines=("a.py:1",)),
        RankResult(
            0,
            graphs=(
                GraphResult("forward", 16, 0.5, facts=FACTS, file="x.ir"),
                GraphResult("head", 0, 0.1, "TypeError: no", ("a.py:1", "b.py:2")),
            ),
            step_reads=7,
            held=(Constant(4, "Float32", (1,), "Cell.x"),),
        ),
    ],
)
def test_there_and_back(value):
    assert from_data(type(value), json.loads(json.dumps(plain_data(value)))) == value


def test_built():
    good, bad = GraphResult("a", 1, 0.0, facts=FACTS), GraphResult("b", 1, 0.0, "no")
    assert RankResult(0, graphs=(good,)).built
    assert not RankResult(0, graphs=(good, bad)).built
    assert not RankResult(0, error="killed").built


def test_reads_are_those_of_all_layers():
    graph = GraphResult("forward and backward", 16, 0.0, facts=FACTS)
    aside = GraphResult("evaluation", 0, 0.0, facts=FACTS)
    result = RankResult(0, layers=16, compiled_layers=1, graphs=(graph, aside))
    assert result.graph_reads == 5 * 16 * 16


def test_what_layers_share_is_read_once():
    facts = GraphFacts(host_reads={"TensorToTuple": 1, "AlltoAllV": 2})
    graph = GraphResult("forward and backward", 4, 0.0, facts=facts)
    assert RankResult(0, layers=8, compiled_layers=2, graphs=(graph,)).graph_reads == 4 * (1 + 8)


DP4 = "parallel_config.data_parallel=4"


@pytest.mark.parametrize(
    "text, changes, expected",
    [
        ("first,last", [], [0, 15]),
        ("last, 3,first,3", [], [0, 3, 15]),
        ("all", [], [0, 8, 15]),
        ("all", [DP4, "parallel_config.pipeline_stage=4"], [0, 4, 12, 15]),
        ("all", [DP4, "parallel_config.context_parallel=2"], [0, 1, 8, 9, 15]),
        ("first,last", ["use_parallel=False"], [0]),
    ],
)
def test_ranks(text, changes, expected):
    assert ranks_of(text, load_config(BIG, changes)) == expected


def test_uneven_stages_are_kinds_of_their_own():
    changes = ["parallel_config.pipeline_stage=4", "parallel_config.data_parallel=4"]
    changes += ["model.model_config.num_layers=33", "model.model_config.offset=[0, 0, 1, 0]"]
    assert ranks_of("all", load_config(BIG, changes)) == [0, 4, 8, 12, 15]


@pytest.mark.parametrize("text", ["16", "lst", "", "first,-1"])
def test_other_ranks_are_refused(text):
    with pytest.raises(UserError, match="0 to 15"):
        ranks_of(text, load_config(BIG))
