"""Single keys set from the command line: `--set section.key=value` and the named flags."""

import dataclasses
from typing import Any

from mixtral_ms.config.loading.yaml_tree import Value, from_python, parse_tree
from mixtral_ms.errors import UserError


@dataclasses.dataclass(frozen=True)
class Override:
    """A key with its value and the flag that gave it (which errors name)."""

    path: str
    """`section.key`; an item of a list by its number or its type:
    `callbacks.CheckpointMonitor.save_checkpoint_steps`."""
    value: Any
    flag: str
    if_present: bool = False
    """Leave the key unset where the file has no such section."""


def parse_override(text: str, flag: str = "--set") -> Override:
    """Read `section.key=value`, the value as YAML.

    Raises:
        UserError: no `=`, an empty key, or a value that is not YAML.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        raise UserError(f"{flag} {text!r}: write it as {flag} section.key=value")
    source = f"{flag} {text}"
    return Override(path, parse_tree(value, source, numbered=False), source)


def apply_override(root: Value, override: Override) -> Value:
    """A copy of the tree with one key set; what is not on the path is shared with `root`."""
    value = override.value
    if not isinstance(value, Value):
        value = from_python(value, override.flag)
    if override.if_present and override.path.split(".")[0] not in root.data:
        return root
    return _set(root, override.path.split("."), value, override)


def _set(node: Value | None, path: list[str], value: Value, override: Override) -> Value:
    if not path:
        return _merged(node, value)
    key, rest = path[0], path[1:]
    if node is not None and isinstance(node.data, list):
        index = _index(key, node.data, override)
        items = list(node.data)
        items[index] = _set(items[index], rest, value, override)
        return dataclasses.replace(node, data=items)
    if node is None or node.data is None:  # a section the file leaves out
        node = Value({}, override.flag)
    if not isinstance(node.data, dict):
        raise UserError(f"{override.flag}: {key!r} of {override.path!r} is below a plain value")
    below = node.data.get(key)
    return dataclasses.replace(node, data={**node.data, key: _set(below, rest, value, override)})


def _merged(below: Value | None, value: Value) -> Value:
    """A section over another one, unless they are of different types: what it lacks stays."""
    if below is None or not isinstance(below.data, dict) or not isinstance(value.data, dict):
        return value
    if _type_of(value) not in (None, _type_of(below)):
        return value
    merged = {key: _merged(below.data.get(key), item) for key, item in value.data.items()}
    return dataclasses.replace(value, data={**below.data, **merged})


def _type_of(section: Value) -> Any:
    kind = section.data.get("type") if isinstance(section.data, dict) else None
    return kind and kind.data


def _index(key: str, items: list[Value], override: Override) -> int:
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    kinds = [_type_of(item) for item in items]
    if key in kinds:
        return kinds.index(key)
    named = ", ".join(str(kind) for kind in kinds if kind)
    raise UserError(
        f"{override.flag}: {key!r} of {override.path!r} must be the number of an item, "
        f"0 to {len(items) - 1}" + (f", or its type: {named}" if named else "")
    )
