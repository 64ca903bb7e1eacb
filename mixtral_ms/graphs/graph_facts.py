"""What can be said of a compiled graph before it runs: operators, sizes, messages, waits."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixtral_ms.graphs.typed_graph import Node, TypedGraph

BOOKKEEPING = frozenset(
    {"Depend", "Load", "MakeList", "MakeTuple", "Return", "TupleGetItem", "UpdateState"}
)
"""Nodes that compute nothing."""
COLLECTIVES = frozenset(
    {
        *("AllReduce", "AllGather", "AllGatherV", "ReduceScatter", "ReduceScatterV", "Broadcast"),
        *("AlltoAll", "AllToAll", "AlltoAllV", "AlltoAllVC", "Send", "Receive"),
    }
)
READ_BY_HOST = {
    "AlltoAllV": (1, 2),
    "AlltoAllVC": (1,),
    "AllGatherV": (1,),
    "ReduceScatterV": (1,),
    "FlashAttentionScore": (8, 9),
    "FlashAttentionScoreGrad": (13, 14),
    "TensorToTuple": (0,),
}
"""Arguments whose values the host must have before it can launch the operator: row counts of a
message, lengths of packed samples. Where they come from the device, the host waits for it."""
READ_ONCE = frozenset({"TensorToTuple"})
"""Of these what all layers share: numbers of the host, which may then be given to any operator."""


@dataclass(frozen=True)
class Dynamic:
    """Results whose size is known only when the graph runs."""

    primitive: str
    count: int
    line: str


@dataclass(frozen=True)
class Collective:
    """Messages of one kind: the bytes are those that a rank gives to all `count` of them."""

    primitive: str
    group: str
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Constant:
    """A tensor that is part of the program, in the graph or held by a cell."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class GraphFacts:
    """Of one graph.

    Attributes:
        primitives: operators and how often they occur, bookkeeping left out.
        dynamic: operators with results of unknown size.
        host_reads: operators that wait for the host to read counts, and how many there are.
        constant: the largest.
        collectives: messages between ranks.
    """

    primitives: dict[str, int] = field(default_factory=dict)
    dynamic: list[Dynamic] = field(default_factory=list)
    host_reads: dict[str, int] = field(default_factory=dict)
    constant: Constant | None = None
    collectives: list[Collective] = field(default_factory=list)


def facts_of(graph: TypedGraph) -> GraphFacts:
    """Count and measure."""
    operators = [node for node in graph.nodes if node.primitive not in BOOKKEEPING]
    counts = Counter(node.primitive for node in operators)
    waits = Counter(node.primitive for node in operators if waits_for_host(node))
    return GraphFacts(
        primitives=dict(sorted(counts.items(), key=lambda one: (-one[1], one[0]))),
        dynamic=list(_dynamic(operators)),
        host_reads=dict(waits),
        constant=max(_constants(operators), key=lambda one: one.bytes, default=None),
        collectives=list(_collectives(operators)),
    )


def waits_for_host(node: Node) -> bool:
    """Whether the host must read what the device computed before it can launch this."""
    for place in READ_BY_HOST.get(node.primitive, ()):
        computed = node.arguments[place].startswith("%") and not _is_given(node.arguments[place])
        if computed and node.inputs[place]:  # numbers, in place of a tensor, the host has
            return True
    return False


def _is_given(argument: str) -> bool:
    """Whether it is an input of the graph, which the host has already."""
    return argument.startswith("%para")


def _dynamic(operators: list[Node]) -> Iterator[Dynamic]:
    found = [node for node in operators if any(one.dynamic for one in node.outputs)]
    lines: dict[str, str] = {}
    for node in found:
        lines[node.primitive] = lines.get(node.primitive) or node.line
    for primitive, count in Counter(node.primitive for node in found).items():
        yield Dynamic(primitive, count, lines[primitive])


def _constants(operators: list[Node]) -> Iterator[Constant]:
    for node in operators:
        for one in node.constants():
            where = f"{node.primitive} {node.line}".strip()
            yield Constant(one.nbytes, one.dtype, one.shape, where)


def _collectives(operators: list[Node]) -> Iterator[Collective]:
    counts: Counter[tuple[str, str, str]] = Counter()
    given: Counter[tuple[str, str, str]] = Counter()
    for node in operators:
        if node.primitive in COLLECTIVES:
            tensors = node.inputs[0] if node.inputs else ()
            dtype = tensors[0].dtype if tensors else ""
            key = (node.primitive, node.attribute("group"), dtype)
            counts[key] += 1
            given[key] += sum(one.nbytes for one in tensors)
    for (primitive, group, dtype), count in sorted(counts.items()):
        yield Collective(primitive, group, dtype, count, given[primitive, group, dtype])
