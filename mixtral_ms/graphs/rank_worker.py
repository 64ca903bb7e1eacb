"""The process that compiles one rank's graphs: `python -m mixtral_ms.graphs.rank_worker JOB OUT`.

A process for each rank, as in the run: MindSpore keeps what it parsed, and a graph may be built for
that reason alone. JOB is a `RankJob` as JSON, OUT the file for its `RankResult`; MindSpore writes
graphs to MS_DEV_SAVE_GRAPHS_PATH.
"""

import dataclasses
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path

from mindspore import Parameter, Tensor, nn

from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.derived.pipeline_stages import stage_layers
from mixtral_ms.config.loading.resolve import effective_parallel, rank_count
from mixtral_ms.files import write_aside
from mixtral_ms.graphs.front_end import FrontEnd, FrontEndUnusableError, GraphError
from mixtral_ms.graphs.graph_facts import Constant, facts_of
from mixtral_ms.graphs.pretended_device import PretendedAscend, without_values
from mixtral_ms.graphs.results import GraphResult, RankJob, RankResult, from_data, plain_data
from mixtral_ms.graphs.run_graphs import RunGraph, graphs_of, with_layers
from mixtral_ms.graphs.step_reads import reads_of_step
from mixtral_ms.graphs.typed_graph import TensorType
from mixtral_ms.parallel.grid.mesh import Mesh


def main(job_file: Path, out: Path) -> None:
    """Compile, and write what was found."""
    begin = time.monotonic()
    job = from_data(RankJob, json.loads(job_file.read_text(encoding="utf-8")))
    config = on_ascend(load_config(job.config, job.overrides))
    result = compile_rank(config, job, Path(os.environ["MS_DEV_SAVE_GRAPHS_PATH"]))
    result = dataclasses.replace(
        result,
        seconds=time.monotonic() - begin,
        peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    with write_aside(out) as aside:
        aside.write_text(json.dumps(plain_data(result)), encoding="utf-8")


def on_ascend(config: RunConfig) -> RunConfig:
    """The same run on an Ascend device."""
    context = dataclasses.replace(config.context, device_target="Ascend")
    return dataclasses.replace(config, context=context)


def compile_rank(config: RunConfig, job: RankJob, folder: Path) -> RankResult:
    """Build the rank's cells, compile their graphs one after the other, look at each."""
    fewer = with_layers(config, job.layers)
    device = PretendedAscend(job.rank)
    mesh = Mesh(effective_parallel(config), job.rank, device.connect)
    stages = mesh.grid.pipeline_stage
    result = RankResult(
        rank=job.rank,
        ranks=rank_count(config),
        stage=mesh.stage,
        stages=stages,
        layers=len(stage_layers(config.model.model_config, stages, mesh.stage)),
        compiled_layers=len(stage_layers(fewer.model.model_config, stages, mesh.stage)),
    )
    with device.in_place():
        try:
            front_end = FrontEnd(folder)
            with without_values():
                graphs = graphs_of(fewer, mesh)
        except FrontEndUnusableError as error:
            return dataclasses.replace(result, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever the network's own code raises
            found = GraphError(error)
            return dataclasses.replace(result, error=str(found), lines=tuple(found.lines))
        held = tuple(_held())
        built = []
        for graph in graphs:
            file = f"rank_{job.rank}.{graph.name.replace(' ', '_')}.ir"
            built.append(_compile(front_end, graph, Path(job.keep) / file if job.keep else None))
        steps = any(graph.runs for graph in graphs)
        reads = reads_of_step(config, job.rank) if steps else None
    return dataclasses.replace(result, graphs=tuple(built), step_reads=reads, held=held)


def _compile(front_end: FrontEnd, graph: RunGraph, keep: Path | None) -> GraphResult:
    begin = time.monotonic()
    try:
        typed = front_end.compile(graph.cell, graph.inputs, keep)
    except GraphError as error:
        seconds = time.monotonic() - begin
        return GraphResult(graph.name, graph.runs, seconds, str(error), tuple(error.lines))
    seconds, file = time.monotonic() - begin, str(keep or "")
    return GraphResult(graph.name, graph.runs, seconds, facts=facts_of(typed), file=file)


def _held() -> list[Constant]:
    """Tensors that this process's cells keep as attributes: of each the largest, largest first."""
    found: dict[str, Constant] = {}
    for cell in [one for one in gc.get_objects() if issubclass(type(one), nn.Cell)]:
        for name, value in vars(cell).items():
            if isinstance(value, Tensor) and not isinstance(value, Parameter):
                where = f"{type(cell).__name__}.{name}"
                kind = TensorType(str(value.dtype), tuple(value.shape))
                one = Constant(kind.nbytes, kind.dtype, kind.shape, where)
                found[where] = max(found.get(where, one), one, key=lambda one: one.bytes)
    return sorted(found.values(), key=lambda one: -one.bytes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
