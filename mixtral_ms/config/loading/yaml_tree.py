"""YAML read into a tree that remembers where each value stands.

PyYAML's nodes carry the line; its Python objects do not. Here a mapping is `Value(dict)`, a list
`Value(list)` and everything else a scalar, each with the file and line (or the flag) it came from.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_utf8

_TAG = "tag:yaml.org,2002:"
_PLAIN_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)")
_KINDS = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map")
_TAGS = {_TAG + kind for kind in _KINDS}
_MAX_DIGITS = 100  # Python refuses to read a whole number of thousands of digits
_MAX_BYTES = 1 << 18  # a run's YAML has some thousands; PyYAML reads 50 kB a second
_MAX_VALUES = 100_000  # aliases of aliases can describe more values than fit in memory


@dataclasses.dataclass
class Value:
    """One value of the YAML: a scalar, `list[Value]` or `dict[str, Value]`."""

    data: Any
    where: str
    """`file:line`, or the flag that gave the value."""
    key_where: str = ""
    """Where the key of this value stands; the same as `where` for an item of a list."""

    def __post_init__(self) -> None:
        self.key_where = self.key_where or self.where


def read_tree(path: str | Path) -> Value:
    """Read a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML or not one mapping; the message
            names the file and, where there is one, the line.
    """
    try:
        with open(path, "rb") as file:  # it may be a pipe
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give --config an existing YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: give --config a YAML file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: more than {_MAX_BYTES} bytes: that is no run's YAML")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, error) from None
    value = parse_tree(text, str(path))
    if not isinstance(value.data, dict):
        found = "nothing" if value.data is None else f"a {type(value.data).__name__}"
        raise UserError(f"{path}: holds {found}, not a mapping of `key: value` lines")
    return value


def parse_tree(text: str, source: str, *, numbered: bool = True) -> Value:
    """Parse YAML text; `source` (with the line when `numbered`) is what errors point at."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{source}:{mark.line + 1}" if numbered and mark else source
        raise UserError(f"{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    if node is None:
        return Value(None, source)
    return _TreeBuilder(source, numbered).build(node)


def from_python(data: Any, where: str) -> Value:
    """Wrap a Python value (of a command-line flag) as a tree."""
    if isinstance(data, dict):
        return Value({str(key): from_python(item, where) for key, item in data.items()}, where)
    if isinstance(data, (list, tuple)):
        return Value([from_python(item, where) for item in data], where)
    return Value(data, where)


class _TreeBuilder:
    """Turns PyYAML nodes into `Value`s; one node seen twice (an alias) is one `Value`."""

    def __init__(self, source: str, numbered: bool) -> None:
        self._source = source
        self._numbered = numbered
        self._done: dict[int, Value] = {}
        self._open: set[int] = set()
        self._sizes: dict[int, int] = {}

    def build(self, node: yaml.Node) -> Value:
        value = self._value(node)
        if self._size(value) > _MAX_VALUES:
            raise UserError(f"{self._source}: aliases expand to more than {_MAX_VALUES} values")
        return value

    def _where(self, node: yaml.Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}" if self._numbered else self._source

    def _value(self, node: yaml.Node) -> Value:
        if id(node) in self._done:
            return self._done[id(node)]
        where = self._where(node)
        if id(node) in self._open:
            raise UserError(f"{where}: an alias contains itself")
        if node.tag not in _TAGS:
            raise UserError(f"{where}: the tag {node.tag!r} is not allowed: write a plain value")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value = Value(self._mapping(node), where)
        elif isinstance(node, yaml.SequenceNode):
            value = Value([self._value(item) for item in node.value], where)
        else:
            value = Value(_scalar(node, where), where)
        self._open.discard(id(node))
        self._done[id(node)] = value
        return value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Value]:
        merged: dict[str, Value] = {}
        own: dict[str, Value] = {}
        for key_node, value_node in node.value:
            where = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{where}: a key must be a word, not a list or a mapping")
            if key_node.tag == _TAG + "merge":
                merged = {**self._merge(value_node), **merged}
                continue
            key = key_node.value
            if key in own:
                first = own[key].key_where
                raise UserError(f"{where}: duplicate key {key!r}, given before at {first}")
            value = self._value(value_node)
            own[key] = dataclasses.replace(value, key_where=where)
        return {**merged, **own}

    def _merge(self, node: yaml.Node) -> dict[str, Value]:
        """The keys that `<<: *anchor` or `<<: [*first, *second]` brings; the first wins."""
        value = self._value(node)
        parts = value.data if isinstance(value.data, list) else [value]
        merged: dict[str, Value] = {}
        for part in parts:
            if not isinstance(part.data, dict):
                raise UserError(f"{value.where}: `<<` takes a mapping, such as `<<: *anchor`")
            merged = {**part.data, **merged}
        return merged

    def _size(self, value: Value) -> int:
        """Number of values below, counting what an alias repeats each time."""
        key = id(value.data)
        if not isinstance(value.data, (dict, list)):
            return 1
        if key not in self._sizes:
            items = value.data.values() if isinstance(value.data, dict) else value.data
            self._sizes[key] = 1 + sum(self._size(item) for item in items)
        return self._sizes[key]


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    """A scalar's value, by YAML 1.1 as PyYAML reads it, with two repairs.

    `1e-5` is a number (PyYAML takes it for text), and neither `1:30` nor `010` is.
    """
    kind, text = node.tag.removeprefix(_TAG), node.value
    plain = node.style is None
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in {"true", "yes", "on"}
    if plain and _PLAIN_INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text.replace("_", ""), 0)
    if plain and not re.fullmatch(r"[-+]?0[0-9]+", text) and _PLAIN_FLOAT.fullmatch(text):
        return float(text)
    if plain and text.lower().lstrip("+-") in {".inf", ".nan"}:
        return float(text.replace(".", ""))
    if kind in {"int", "float"} and not plain:
        raise UserError(f"{where}: {text!r} has a number's tag and quotes: remove both")
    return text
