"""What this project asks of every graph for Ascend, and what it does not keep yet.

RULES are checked on each compiled graph, KNOWN says where one is broken today and why. A graph must
break exactly the rules that KNOWN says: what is mended leaves the list in the same change.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ascend.cache_contracts import CACHE_OPERATORS
from ascend.operator_contracts import OPERATORS, tensors

from mixtral_ms.graphs.graph_facts import BOOKKEEPING, Constant
from mixtral_ms.graphs.typed_graph import TypedGraph

ALL_OPERATORS = OPERATORS | CACHE_OPERATORS
MOST_CONSTANT = 64 << 20
"""Bytes of one constant: it lies in every rank's memory, once for each graph and layer."""
_AXES_OF_HIDDEN = 3
_NAME = re.compile(r"%\d+")
_EXPERT_WEIGHTS = (".ffn.w1.weight", ".ffn.w2.weight", ".ffn.w3.weight")


@dataclass(frozen=True)
class CompiledGraph:
    """A graph and what of its run the rules ask for.

    Attributes:
        graph: as MindSpore writes it down.
        name: what it computes.
        layers: decoder layers in it.
        sequence, part: S, and how much of it this rank has.
        recompute: whether layers go forward and are then computed again in the backward pass.
        layer_inputs: whether they are only computed again, from inputs that were kept.
        drops: whether tokens are dropped, so that every size is known before it runs.
        predicts: whether it works on a cache, token by token.
        working: whether it computes with a copy of the matrices in the compute dtype.
        held: tensors that cells keep.
    """

    graph: TypedGraph
    name: str = "forward"
    layers: int = 1
    sequence: int = 80
    part: int = 80
    recompute: bool = False
    layer_inputs: bool = False
    drops: bool = False
    predicts: bool = False
    working: bool = False
    held: tuple[Constant, ...] = ()


Rule = Callable[[CompiledGraph], Iterator[str]]


def operators_are_known(one: CompiledGraph) -> Iterator[str]:
    """Nothing runs whose documentation was not read."""
    names = {node.primitive for node in one.graph.nodes}
    yield from sorted(names - BOOKKEEPING - ALL_OPERATORS.keys())


def operators_get_what_they_document(one: CompiledGraph) -> Iterator[str]:
    """Dtypes and shapes."""
    for node in one.graph.nodes:
        for problem in ALL_OPERATORS.get(node.primitive, lambda _: ())(node):
            yield f"{node.primitive} ({node.line}): {problem}"


def no_float64(one: CompiledGraph) -> Iterator[str]:
    """Ascend's products know none, and everything else is slow with it."""
    for node in one.graph.nodes:
        if any(tensor.dtype == "Float64" for tensor in (*tensors(node), *node.outputs)):
            yield f"{node.primitive} ({node.line})"


def no_large_constant(one: CompiledGraph) -> Iterator[str]:
    """In the graph."""
    for node in one.graph.nodes:
        for constant in node.constants():
            if constant.nbytes > MOST_CONSTANT:
                yield f"{constant.nbytes >> 20} MiB {list(constant.shape)} in {node.primitive}"


def no_square_constant(one: CompiledGraph) -> Iterator[str]:
    """S x S values, in the graph or held by a cell, whatever S is."""
    constants = [(node.primitive, it) for node in one.graph.nodes for it in node.constants()]
    constants += [(held.where, held) for held in one.held]
    for where, constant in constants:
        if _is_square(constant.shape, one):
            yield f"{list(constant.shape)} in {where}"


def no_square_tensor(one: CompiledGraph) -> Iterator[str]:
    """S x S masks, or scores of heads: flash attention is there to have none.

    By what they are, as the hidden states (B, S, D) of a network may be as wide as they are long.
    """
    for node in one.graph.nodes:
        for tensor in node.outputs:
            kind = tensor.dtype == "Bool" or len(tensor.shape) > _AXES_OF_HIDDEN
            if kind and not one.predicts and _is_square(tensor.shape, one):
                yield f"{list(tensor.shape)} by {node.primitive} ({node.line})"


def _is_square(shape: tuple[int, ...], one: CompiledGraph) -> bool:
    lengths = (one.sequence, one.part)
    return len(shape) > 1 and shape[-1] in lengths and shape[-2] in lengths


def flash_attention_in_every_layer(one: CompiledGraph) -> Iterator[str]:
    """Once forward, once more where the layer is computed again, once backward."""
    if one.predicts:
        found = len(one.graph.of("FlashAttentionScore")) + len(one.graph.of("PagedAttention"))
        if found != one.layers:
            yield f"{found} fused attentions in {one.layers} layers"
        return
    trains = one.name == "forward and backward"
    expected = {
        "FlashAttentionScore": one.layers * (2 if trains and one.recompute else 1),
        "FlashAttentionScoreGrad": one.layers if trains else 0,
    }
    for primitive, count in expected.items():
        if (found := len(one.graph.of(primitive))) != count:
            yield f"{primitive} {found} times, not {count}"


def layers_are_computed_again_one_by_one(one: CompiledGraph) -> Iterator[str]:
    """Each waits for the gradient of the one behind: all of them at once would fill the memory."""
    if one.name != "forward and backward" or not (one.recompute or one.layer_inputs):
        return
    behind: set[str] = set()  # what waits for a gradient of attention
    for node in one.graph.nodes:
        names = {name for argument in node.arguments for name in _NAME.findall(argument)}
        if node.primitive == "FlashAttentionScoreGrad" or names & behind:
            behind.add(node.name)
    waiting = [node for node in one.graph.of("FlashAttentionScore") if node.name in behind]
    if len(waiting) < one.layers - 1:
        yield f"{len(waiting)} of {one.layers} layers wait for the one behind"


def expert_weights_are_not_copied_transposed(one: CompiledGraph) -> Iterator[str]:
    """A view will do (TransposeExtView): a copy reads and writes all experts."""
    shapes = {
        tensor.shape
        for name, tensor in one.graph.parameters.items()
        if name.endswith(_EXPERT_WEIGHTS)
    }
    for node in one.graph.of("Transpose"):
        if tensors(node)[0].shape in shapes:
            yield f"{list(tensors(node)[0].shape)} ({node.line})"


def experts_are_working_weights(one: CompiledGraph) -> Iterator[str]:
    """They are cast once a step, not in every micro batch."""
    for name, tensor in one.graph.parameters.items():
        weight = name.endswith(_EXPERT_WEIGHTS) and not name.startswith("grad_sum.")
        if one.working and weight and tensor.dtype == "Float32":
            yield name


def sizes_are_known(one: CompiledGraph) -> Iterator[str]:
    """Only how many rows come for the experts may be open, and only if none is dropped."""
    allowed = () if one.drops else ("AlltoAllV", "AlltoAllVC", "Reshape")
    for node in one.graph.nodes:
        if node.primitive not in allowed and any(tensor.dynamic for tensor in node.outputs):
            yield f"{node.primitive} ({node.line})"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        operators_are_known,
        operators_get_what_they_document,
        no_float64,
        no_large_constant,
        no_square_constant,
        no_square_tensor,
        flash_attention_in_every_layer,
        layers_are_computed_again_one_by_one,
        expert_weights_are_not_copied_transposed,
        experts_are_working_weights,
        sizes_are_known,
    )
}


@dataclass(frozen=True)
class Known:
    """Graphs (`case / graph`, by pattern) that break a rule, and why."""

    rule: str
    why: str
    graphs: tuple[str, ...]


KNOWN: tuple[Known, ...] = ()
"""None today."""


def known_of(case: str, graph: str) -> set[str]:
    """Rules that a graph is known to break."""
    name = f"{case} / {graph}"
    return {one.rule for one in KNOWN if any(fnmatchcase(name, pattern) for pattern in one.graphs)}


def broken_by(one: CompiledGraph) -> dict[str, list[str]]:
    """Rules that a graph breaks, with what is wrong."""
    found = {name: list(rule(one)) for name, rule in RULES.items()}
    return {name: problems for name, problems in found.items() if problems}
