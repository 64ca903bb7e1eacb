"""Every graph of every kind of run passes MindSpore's front end as on Ascend."""

import pytest
from ascend.graph_cases import ALL_CASES


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES)
def test_graphs_are_built(case, compiled):
    result = compiled(case)
    failed = {graph.name: (graph.error, graph.lines) for graph in result.graphs if graph.error}
    assert (result.error, failed) == ("", {})
    assert result.graphs
