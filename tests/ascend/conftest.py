"""Graphs are compiled once for all tests that look at them, two processes at a time."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from ascend.graph_cases import GRAPH_CASES

from mixtral_ms.graphs.check_ranks import check_ranks

_PROCESSES = 2


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """Name of a case -> the result of its rank, with MindSpore's files of its graphs."""
    folder = tmp_path_factory.mktemp("graphs")
    users = [item for item in request.session.items if "compiled" in item.fixturenames]
    chosen = [item.callspec.params["case"] for item in users]

    def compile_case(name):
        keep = folder / name.replace(" ", "_").replace("|", "")
        keep.mkdir()
        job = dataclasses.replace(GRAPH_CASES[name].job, keep=str(keep))
        return check_ranks([job])[0]

    with ThreadPoolExecutor(_PROCESSES) as pool:
        futures = {name: pool.submit(compile_case, name) for name in dict.fromkeys(chosen)}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()
