"""A graph as MindSpore writes it down (IR files): operators, types, shapes, lines of code."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""Lines of code are those of this package."""

_NODE = re.compile(r"\s*(?:(%\d+)\(.*?\) = )?(?:PrimFunc_)?([A-Za-z@]\w*)\((.*)$")
_NODE_START = re.compile(r"\s+(?:%\d+\(|Return\()")
_TYPES = re.compile(r"\s+: \((?:<|\) -> )")
_PARAMETER = re.compile(r"%para\d+_(\S+): (<.*>)")
_SOURCE = re.compile(
    rf"# In file {re.escape(str(PACKAGE.parent))}/({PACKAGE.name}/[^:]+\.py):(\d+)"
)
_CONSTANT = re.compile(r"Tensor\(shape=\[([\d, ]*)\], dtype=(\w+)")
_BYTES = {"Bool": 1, "BFloat16": 2, "UMonad": 0, "IOMonad": 0, "None": 0}


@dataclass(frozen=True)
class TensorType:
    """dtype as the IR names it (BFloat16, Int64) and shape; -1 is a size known when it runs."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def dynamic(self) -> bool:
        """Whether a size, or the number of axes, is known only when it runs."""
        return any(size < 0 for size in self.shape)

    @property
    def nbytes(self) -> int:
        """Of its values; 0 where a size is not known."""
        return 0 if self.dynamic else math.prod(self.shape) * value_bytes(self.dtype)


def value_bytes(dtype: str) -> int:
    """Bytes of a value of an IR dtype."""
    bits = re.search(r"\d+$", dtype)
    return _BYTES[dtype] if dtype in _BYTES else int(bits[0]) // 8 if bits else 0


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    Attributes:
        primitive: the operator's name.
        arguments: each as the IR writes it: `%12`, `I64(3)`, `Tensor(shape=[8], …)`, `%para4_name`.
        inputs: of each argument the tensors in it: one, several for a tuple, none for a number.
        outputs: its tensors.
        attributes: of the operator, as the IR writes them.
        line: `file.py:12`, the innermost line of this package that it is from; "" where the IR
            names none, as for most of a backward pass.
        name: what other operators' arguments call its result: `%12`.
    """

    primitive: str
    arguments: tuple[str, ...]
    inputs: tuple[tuple[TensorType, ...], ...]
    outputs: tuple[TensorType, ...]
    attributes: str
    line: str
    name: str = ""

    def constants(self) -> Iterator[TensorType]:
        """Tensors whose values are part of the graph."""
        for argument in self.arguments:
            for shape, dtype in _CONSTANT.findall(argument):
                yield TensorType(dtype, _sizes(shape))

    def attribute(self, name: str) -> str:
        """An attribute's text; "" without it."""
        found = re.search(rf"\b{name}: (\"[^\"]*\"|[^,}}]+)", self.attributes)
        return found[1].strip('"') if found else ""


@dataclass(frozen=True)
class TypedGraph:
    """All nodes of a compiled graph, those of functions that it calls included.

    Attributes:
        parameters: what it is given, by name.
        nodes: in the order of the file.
        outputs: of each thing that it returns the tensors in it.
    """

    parameters: dict[str, TensorType]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[TensorType, ...], ...]

    def of(self, *primitives: str) -> list[Node]:
        """Nodes of some operators."""
        return [node for node in self.nodes if node.primitive in primitives]


def read_typed_graph(path: Path) -> TypedGraph:
    """Read an IR file of MindSpore."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parameters: dict[str, TensorType] = {}
    for line in lines:
        if found := _PARAMETER.match(line):
            parameters.update((found[1], one) for one in tensor_types(found[2]))
    starts = [number for number, line in enumerate(lines) if _NODE_START.match(line)]
    blocks = zip(starts, [*starts[1:], len(lines)], strict=True)
    nodes = (_node(lines[begin:end]) for begin, end in blocks)
    returned = next(line for line in reversed(starts) if lines[line].lstrip().startswith("Return("))
    return TypedGraph(
        parameters,
        tuple(node for node in nodes if node is not None),
        tuple(_returned(lines[returned + 1].strip())),
    )


def _returned(types: str) -> Iterator[tuple[TensorType, ...]]:
    """`: (<Tuple[Tensor[Int8]*2,Tensor[Int32]], TupleShape((4), (), (2))>)`, one by one."""
    kind, shape, *_ = split_outside(types.removeprefix(": (<").removesuffix(">)"))
    if not kind.startswith("Tuple["):
        yield tuple(tensor_types(f"<{kind}, {shape}>"))
        return
    kinds = [one for part in split_outside(kind[len("Tuple[") : -1]) for one in _repeated(part)]
    shapes = split_outside(shape.removeprefix("TupleShape")[1:-1])
    for one, size in zip(kinds, shapes, strict=True):
        yield tuple(tensor_types(f"<{one}, {size}>"))


def _node(lines: list[str]) -> Node | None:
    found = _NODE.match(lines[0])
    if found is None:
        return None
    given_to, rest = _enclosed(found[3])
    types = next((line for line in lines[1:] if _TYPES.match(line)), ": () -> ()")
    given, _, made = types.strip().removeprefix(": ").partition(" -> ")
    inputs = tuple(tuple(tensor_types(one)) for one in split_outside(given[1:-1]))
    outputs = tuple(tensor_types(made[1:-1])) if made.strip("()") else ()
    arguments = tuple(split_outside(given_to))
    line = _line_of_code(lines[1:])
    return Node(found[2], arguments, inputs, outputs, rest, line, found[1] or "")


def _line_of_code(lines: list[str]) -> str:
    for line in reversed(lines):
        if found := _SOURCE.search(line):
            return f"{found[1]}:{found[2]}"
    return ""


def _enclosed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes an open one, and what behind it."""
    depth, quoted = 1, False
    for place, letter in enumerate(text):
        quoted ^= letter == '"'
        if not quoted:
            depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def split_outside(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


def tensor_types(text: str) -> Iterator[TensorType]:
    """Tensors of `<Tuple[Tensor[Int32]*2], TupleShape((4), (4, -1)), …>`; numbers are left out."""
    kind, *shape = split_outside(text.strip().removeprefix("<").removesuffix(">"))
    kinds = _leaves(kind)
    shapes = _shapes(shape[0]) if shape else []
    if len(shapes) != len(kinds):  # a sequence whose length is known only when it runs
        shapes = ["(-2)"] * len(kinds)
    for one, size in zip(kinds, shapes, strict=True):
        if one.startswith("Tensor["):
            yield TensorType(one[len("Tensor[") : -1], _sizes(size.strip("()")))


def _leaves(kind: str) -> list[str]:
    """`Tuple[Tensor[Int32]*2,Int64]` -> Tensor[Int32] twice, Int64."""
    if kind.startswith("Ref["):
        return _leaves(kind[len("Ref[") : -1])
    if not kind.startswith(("Tuple[", "List[")):
        return [kind]
    parts = split_outside(kind[kind.index("[") + 1 : -1])
    return [leaf for part in parts for one in _repeated(part) for leaf in _leaves(one)]


def _repeated(kind: str) -> list[str]:
    """`Tensor[Int32]*2` -> Tensor[Int32] twice."""
    found = re.fullmatch(r"(.*)\*(\d+)", kind)
    return [found[1]] * int(found[2]) if found else [kind]


def _shapes(shape: str) -> list[str]:
    """`TupleShape((4), NoShape)` -> (4), NoShape."""
    name, bracket, _ = shape.partition("(")
    if name in ("TupleShape", "ListShape") and bracket:
        return [one for part in split_outside(shape[len(name) + 1 : -1]) for one in _shapes(part)]
    return [shape]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"-?\d+", text))
