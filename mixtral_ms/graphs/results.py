"""What is found out of a run's graphs, and the same as plain data."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from mixtral_ms.graphs.graph_facts import READ_ONCE, Constant, GraphFacts


@dataclass(frozen=True)
class RankJob:
    """One rank of a run, whose graphs are to be compiled.

    Attributes:
        config: the YAML.
        overrides: `section.key=value`, as --set takes them.
        rank: its number.
        layers: most decoder layers of a pipeline stage to compile; None for all.
        keep: folder for MindSpore's files of the graphs; "" keeps none.
    """

    config: str
    overrides: tuple[str, ...] = ()
    rank: int = 0
    layers: int | None = None
    keep: str = ""


@dataclass(frozen=True)
class GraphResult:
    """One graph: built, or why not.

    Attributes:
        name: what it computes.
        runs: how often a training step runs it; 0 outside of steps.
        seconds: of compiling.
        error: "" when it was built.
        lines: of this package's code, that the error comes from; the innermost last.
        facts: None when it was not built.
        file: MindSpore's file of the graph, where it was to be kept.
    """

    name: str
    runs: int
    seconds: float
    error: str = ""
    lines: tuple[str, ...] = ()
    facts: GraphFacts | None = None
    file: str = ""

    @property
    def built(self) -> bool:
        """Whether MindSpore's front end compiles it."""
        return not self.error


@dataclass(frozen=True)
class RankResult:
    """The graphs of one rank.

    Attributes:
        rank, ranks: its number, and how many there are.
        stage, stages: of the pipeline, from 0.
        layers, compiled_layers: decoder layers of its stage in the run, and those that were
            compiled.
        graphs: in the order of the run.
        step_reads: times that the host reads a tensor in a training step outside its graphs; None
            where there is no step, or it could not be counted.
        held: tensors that cells keep beside their parameters, in a graph or not; of each cell's
            attribute the largest, the largest first.
        seconds: of the whole process, MindSpore's import and the network's building included.
        peak_bytes: of that process's memory.
        error: why there are no graphs: the network could not be built, MindSpore's front end cannot
            be used, the process was killed.
    """

    rank: int
    ranks: int = 1
    stage: int = 0
    stages: int = 1
    layers: int = 0
    compiled_layers: int = 0
    graphs: tuple[GraphResult, ...] = ()
    step_reads: int | None = None
    held: tuple[Constant, ...] = ()
    seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    lines: tuple[str, ...] = ()

    @property
    def built(self) -> bool:
        """Whether all of its graphs are."""
        return not self.error and all(graph.built for graph in self.graphs)

    @property
    def graph_reads(self) -> int:
        """Times that operators of a training step wait for the host to read counts.

        With all layers of the run: those that were compiled stand for the others.
        """
        total = 0
        for graph in self.graphs:
            for primitive, count in graph.facts.host_reads.items() if graph.facts else ():
                shared = primitive in READ_ONCE
                layers = 1 if shared else self.layers / max(1, self.compiled_layers)
                total += round(graph.runs * count * layers)
        return total


@dataclass(frozen=True)
class CheckResult:
    """All ranks that were asked for."""

    config: str
    run_mode: str
    mindspore: str
    ranks: tuple[RankResult, ...] = field(default_factory=tuple)

    @property
    def built(self) -> bool:
        """Whether every graph of every rank is."""
        return all(rank.built for rank in self.ranks)


def plain_data(result: Any) -> dict[str, Any]:
    """A result as JSON can hold it."""
    return dataclasses.asdict(result)


def from_data(kind: Any, data: Any) -> Any:
    """What `plain_data` and JSON made of a value of a type."""
    if data is None or kind in (str, int, float, bool):
        return data
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return from_data(arguments[0], data)  # the other one is None
    if origin in (tuple, list):
        return origin(from_data(arguments[0], one) for one in data)
    if origin is dict:
        return data
    hints = typing.get_type_hints(kind)
    return kind(**{name: from_data(hints[name], value) for name, value in data.items()})
