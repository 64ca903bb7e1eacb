"""People are told what is built, what is not, and where."""

from mixtral_ms.graphs.graph_facts import Collective, Constant, Dynamic, GraphFacts
from mixtral_ms.graphs.graphs_report import graphs_text
from mixtral_ms.graphs.results import CheckResult, GraphResult, RankResult

FACTS = GraphFacts(
    {"AlltoAllV": 5, "MatMul": 1234},
    [Dynamic("AlltoAllV", 5, "mixtral_ms/a.py:7")],
    {"AlltoAllV": 5},
    Constant(4 << 20, "Bool", (2048, 2048), "FlashAttentionScore"),
    [Collective("AlltoAllV", g, "BFloat16", 2, 1 << 30) for g in ("ranks_0_1", "ranks_2_3")],
)


def report(*ranks):
    return graphs_text(CheckResult("run.yaml", "train", "2.7.2", ranks))


def test_what_is_built():
    graph = GraphResult("forward and backward", 16, 12.34, facts=FACTS)
    text = report(
        RankResult(3, 16, 0, 2, 16, 1, (graph,), 278, FACTS.constant and (FACTS.constant,))
    )
    assert "run_mode train, 16 ranks" in text
    assert "rank 3 (stage 1 of 2, 1 of its 16 layers)" in text
    row = next(line for line in text.splitlines() if "12.3" in line)
    assert row.split() == [
        *("forward", "and", "backward", "yes", "12.3", "1,239", "5", "5"),
        *("4.0", "MiB", "4", "2.0", "GiB"),
    ]
    assert "1,280 of graphs, 278 of the step around them" in text
    assert "dynamic: AlltoAllV, 5 times, first at mixtral_ms/a.py:7" in text
    assert "messages: AlltoAllV of BFloat16, 4 times, 2.0 GiB" in text
    assert text.endswith("every graph was built")


def test_what_is_not():
    lines = ("mixtral_ms/outer.py:1", "mixtral_ms/inner.py:2")
    failed = GraphResult("forward", 1, 0.5, "TypeError: no such thing", lines)
    text = report(RankResult(0, graphs=(failed,)), RankResult(1, error="the process was ended"))
    found = text.splitlines()
    at = found.index("  forward failed: TypeError: no such thing")
    assert found[at + 1 : at + 3] == [
        "    at mixtral_ms/inner.py:2",
        "    at mixtral_ms/outer.py:1",
    ]
    assert "  failed: the process was ended" in found
    assert found[-1] == "not built: 2"
