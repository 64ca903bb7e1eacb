"""Results as people read them: a table for each rank, then what its graphs have in them."""

import textwrap
from collections import Counter
from collections.abc import Iterator

from mixtral_ms.graphs.graph_facts import Constant, GraphFacts
from mixtral_ms.graphs.results import CheckResult, GraphResult, RankResult
from mixtral_ms.parallel.planner.memory_model import format_bytes

_COLUMNS = (
    ("graph", -22),
    ("built", 7),
    ("seconds", 9),
    ("operators", 11),
    ("dynamic", 9),
    ("host reads", 12),
    ("constant", 11),
    ("messages", 10),
    ("bytes", 11),
)
_LEGEND = (
    "operators: of the compiled layers; dynamic: those with results of unknown size; host reads: "
    "operators that wait until the host has read counts from the device; constant: the largest; "
    "messages, bytes: what a rank gives to collectives"
)


def graphs_text(result: CheckResult) -> str:
    """A table for each rank, then what was found in its graphs."""
    ranks = result.ranks[0].ranks if result.ranks else 1
    lines = [
        f"{result.config}: run_mode {result.run_mode}, {ranks} rank{'s' * (ranks > 1)}, by the "
        f"front end of MindSpore {result.mindspore}",
    ]
    for rank in result.ranks:
        lines += ["", *_rank(rank)]
    failed = sum(not graph.built for rank in result.ranks for graph in rank.graphs)
    failed += sum(bool(rank.error) for rank in result.ranks)
    lines += ["", _LEGEND, "every graph was built" if result.built else f"not built: {failed}"]
    return "\n".join(lines)


def _rank(rank: RankResult) -> Iterator[str]:
    yield (
        f"rank {rank.rank} (stage {rank.stage + 1} of {rank.stages}, {rank.compiled_layers} of its "
        f"{rank.layers} layers), {rank.seconds:.0f} s, {format_bytes(rank.peak_bytes)} of memory"
    )
    if rank.error:
        yield f"  failed: {rank.error}"
        yield from _lines_of_code(rank.lines)
        return
    yield "  " + "".join(f"{name:{_format(width)}}" for name, width in _COLUMNS)
    for graph in rank.graphs:
        yield "  " + "".join(
            f"{cell:{_format(width)}}"
            for cell, (_, width) in zip(_row(graph), _COLUMNS, strict=False)
        )
    for graph in rank.graphs:
        if not graph.built:
            yield f"  {graph.name} failed: {graph.error}"
            yield from _lines_of_code(graph.lines)
    if rank.step_reads is not None:
        yield (
            f"  host reads in a training step: {rank.graph_reads:,} of graphs, "
            f"{rank.step_reads:,} of the step around them"
        )
    if rank.held:
        yield f"  largest tensor held by a cell: {_constant(rank.held[0])}"
    for graph in rank.graphs:
        if graph.facts is not None:
            yield from _found(graph.name, graph.facts)


def _row(graph: GraphResult) -> list[str]:
    row = [graph.name, "yes" if graph.built else "NO", f"{graph.seconds:.1f}"]
    facts = graph.facts
    if facts is None:
        return row
    return [
        *row,
        f"{sum(facts.primitives.values()):,}",
        f"{sum(one.count for one in facts.dynamic):,}",
        f"{sum(facts.host_reads.values()):,}",
        format_bytes(facts.constant.bytes) if facts.constant else "-",
        f"{sum(one.count for one in facts.collectives):,}",
        format_bytes(sum(one.bytes for one in facts.collectives)),
    ]


def _found(name: str, facts: GraphFacts) -> Iterator[str]:
    yield f"  {name}:"
    operators = ", ".join(f"{one} {count}" for one, count in facts.primitives.items())
    yield from textwrap.wrap(operators, 96, initial_indent=" " * 4, subsequent_indent=" " * 4)
    for one in facts.dynamic:
        yield f"    dynamic: {one.primitive}, {one.count} times, first at {one.line or '?'}"
    for primitive, count in facts.host_reads.items():
        yield f"    host reads: {primitive}, {count} times"
    if facts.constant:
        yield f"    largest constant: {_constant(facts.constant)}"
    yield from _messages(facts)


def _messages(facts: GraphFacts) -> Iterator[str]:
    """By operator and dtype, over all groups."""
    counts: Counter[tuple[str, str]] = Counter()
    given: Counter[tuple[str, str]] = Counter()
    for one in facts.collectives:
        counts[one.primitive, one.dtype] += one.count
        given[one.primitive, one.dtype] += one.bytes
    for (primitive, dtype), count in counts.items():
        size = format_bytes(given[primitive, dtype])
        yield f"    messages: {primitive} of {dtype}, {count} times, {size}"


def _constant(one: Constant) -> str:
    return f"{format_bytes(one.bytes)}, {one.dtype} {list(one.shape)} in {one.where}"


def _lines_of_code(lines: tuple[str, ...]) -> Iterator[str]:
    for line in reversed(lines):
        yield f"    at {line}"


def _format(width: int) -> str:
    return f"<{-width}" if width < 0 else f">{width}"
