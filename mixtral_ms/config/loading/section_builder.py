"""A tree of YAML values turned into typed dataclasses, with every mistake collected."""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeGuard

from mixtral_ms.config.loading.yaml_tree import Value
from mixtral_ms.config.sections.fields import (
    ADVICE,
    DERIVED,
    GIVES_WAY,
    INERT,
    ONE_OF,
    UNSUPPORTED,
    VARIANTS,
)
from mixtral_ms.errors import UserError

MOST_ERRORS = 50
"""As many are shown."""
_MOST_SHOWN = 200
_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when nothing is similar."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


class SectionBuilder:
    """Builds dataclasses from trees; `errors` and `notices` fill on the way."""

    def __init__(self, root: type) -> None:
        self.errors: list[str] = []
        self.notices: list[str] = []
        self._root = root

    def section(self, cls: type, value: Value, path: str = "") -> Any:
        """An instance of `cls`, or None after errors."""
        if not isinstance(value.data, dict):
            self._wrong(value, path, f"a section with the keys {_listed(_fields(cls))}")
            return None
        before = len(self.errors)
        fields, hints, given = _fields(cls), _hints(cls), {}
        for key, item in value.data.items():
            key_path = f"{path}.{key}" if path else key
            if key not in fields:
                self._unknown_key(key, item, key_path, fields)
                continue
            given[key] = self._field(fields[key], hints[key], item, key_path)
        if len(self.errors) > before:
            return None
        try:
            return cls(**given)
        except UserError as error:
            self.errors.append(f"{value.where}: {path}: {error}")
            return None

    def _field(self, field: dataclasses.Field, hint: Any, value: Value, path: str) -> Any:
        if VARIANTS in field.metadata:
            return self._variant_list(field.metadata[VARIANTS], value, path)
        if ONE_OF in field.metadata:
            return self._convert_literal(tuple(field.metadata[ONE_OF]), value, path)
        if DERIVED in field.metadata and value.data is None:
            return None
        before = len(self.errors)
        converted = self._convert(hint, value, path)
        if len(self.errors) > before:
            self.errors[-1] += field.metadata.get(ADVICE, "")
        elif converted != field.default:
            self._note_effect(field, converted, value, path)
        return converted

    def _note_effect(
        self, field: dataclasses.Field, converted: Any, value: Value, path: str
    ) -> None:
        """Say that a value other than the default changes nothing here, or cannot be had."""
        if UNSUPPORTED in field.metadata:
            why = field.metadata[UNSUPPORTED]
            self.errors.append(
                f"{value.where}: {path}: {converted!r} given; only {field.default!r} is "
                f"supported: {why}"
            )
        elif INERT in field.metadata:
            why = field.metadata[INERT]
            self.notices.append(f"{value.where}: {path}: {converted!r} has no effect here: {why}")

    def _variant_list(self, table: dict[str, type], value: Value, path: str) -> list:
        if not isinstance(value.data, list):
            self._wrong(value, path, "a list of sections, each `- type: …`")
            return []
        sections = []
        for index, item in enumerate(value.data):
            item_path = f"{path}.{index}"
            kind = item.data.get("type") if isinstance(item.data, dict) else None
            if kind is None:
                self._wrong(item, item_path, f"a section with `type:`, one of {_listed(table)}")
            elif not isinstance(kind.data, str) or kind.data not in table:
                self._not_allowed(kind, f"{item_path}.type", tuple(table))
            else:
                sections.append(self.section(table[kind.data], item, item_path))
        return sections

    def _convert(self, hint: Any, value: Value, path: str) -> Any:
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            return self._convert_union(typing.get_args(hint), value, path)
        if origin is Literal:
            return self._convert_literal(typing.get_args(hint), value, path)
        if origin is list or hint is list:
            return self._convert_list(typing.get_args(hint), value, path)
        if _is_section(hint):
            return self.section(hint, value, path)
        if hint is dict:
            if not isinstance(value.data, dict):
                self._wrong(value, path, "a mapping")
            return to_python(value)
        return self._convert_scalar(hint, value, path)

    def _convert_scalar(self, kind: type, value: Value, path: str) -> Any:
        data = value.data
        if kind is float and type(data) in (int, float):
            return self._finite(value, path)
        if type(data) is not kind:
            self._wrong(value, path, _NAMES[kind], _quote_advice(kind, data))
        return data

    def _finite(self, value: Value, path: str) -> float:
        try:
            number = float(value.data)
        except OverflowError:  # a whole number beyond 1e308
            number = math.inf
        if not math.isfinite(number):
            self.errors.append(f"{value.where}: {path}: {number} given; it must be finite")
        return number

    def _convert_literal(self, allowed: tuple, value: Value, path: str) -> Any:
        for choice in allowed:
            if type(value.data) is type(choice) and value.data == choice:
                return choice
        self._not_allowed(value, path, allowed)
        return None

    def _convert_list(self, args: tuple, value: Value, path: str) -> list:
        if not isinstance(value.data, list):
            self._wrong(value, path, "a list")
            return []
        if not args:
            return to_python(value)
        return [
            self._convert(args[0], item, f"{path}.{index}") for index, item in enumerate(value.data)
        ]

    def _convert_union(self, arms: tuple, value: Value, path: str) -> Any:
        if value.data is None and types.NoneType in arms:
            return None
        if value.data == "None" and types.NoneType in arms:
            self._wrong(value, path, "something else", ": what is empty is null in YAML")
            return None
        arms = tuple(arm for arm in arms if arm is not types.NoneType)
        if len(arms) == 1:
            return self._convert(arms[0], value, path)
        for arm in arms:
            if _is_section(arm) and isinstance(value.data, dict):
                return self.section(arm, value, path)
            attempt = SectionBuilder(self._root)
            converted = attempt._convert(arm, value, path)
            if not attempt.errors:
                self.notices += attempt.notices
                return converted
        self._wrong(value, path, " or ".join(_type_name(arm) for arm in arms))
        return None

    def _wrong(self, value: Value, path: str, wanted: str, advice: str = "") -> None:
        if isinstance(value.data, list) and "section" in wanted and not advice:
            advice = ": one, without the dash before it"
        key = f"{value.where}: {path}" if path else value.where
        self.errors.append(f"{key}: {_shown(value.data)} given; {wanted} is needed{advice}")

    def _not_allowed(self, value: Value, path: str, allowed: tuple) -> None:
        close = nearest(str(value.data), [str(choice) for choice in allowed])
        hint = f"; did you mean {close}?" if close else ""
        if isinstance(value.data, bool) and isinstance(allowed[0], str):
            hint = ": put it in quotes"  # YAML reads on, off, yes and no as True and False
        self._wrong(value, path, f"one of {_listed(allowed)}", hint)

    def _unknown_key(self, key: str, value: Value, path: str, fields: dict) -> None:
        if len(self.errors) >= MOST_ERRORS:  # not shown, and a likeness takes a millisecond
            self.errors.append(f"{value.key_where}: unknown key {path!r}")
            return
        close = nearest(key, fields)
        elsewhere = [full for full in _acting_keys(self._root) if full.split(".")[-1] == key]
        if close and (not elsewhere or close.lower() == key.lower()):
            advice = f"did you mean {close!r}?{_what_acts(fields[close], path)}"
        elif elsewhere:
            advice = f"it belongs at {elsewhere[0]!r}"
        else:
            advice = f"known keys there: {_listed(fields)}"
        self.errors.append(f"{value.key_where}: unknown key {path!r}: {advice}")


def _what_acts(field: dataclasses.Field, path: str) -> str:
    """Of a key that is like a wrong one: what is to be set in its place, where it does not act."""
    if INERT in field.metadata:
        return f" It has no effect here: {field.metadata[INERT]}"
    if GIVES_WAY in field.metadata and not path.startswith("eval_dataset"):
        return f" {field.metadata[GIVES_WAY]} wins over it"
    return ""


def to_python(value: Value) -> Any:
    """The plain Python value of a tree, for keys of free form."""
    if isinstance(value.data, dict):
        return {key: to_python(item) for key, item in value.data.items()}
    if isinstance(value.data, list):
        return [to_python(item) for item in value.data]
    return value.data


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@functools.cache
def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _acting_keys(cls: type) -> tuple[str, ...]:
    """Full paths, as overrides take them, of all keys under a section that act; shallow first."""
    return tuple(sorted(_walk_keys(cls), key=lambda path: path.count(".")))


def _walk_keys(cls: type) -> Iterator[str]:
    for name, field in _fields(cls).items():
        if not field.metadata.keys() & {INERT, UNSUPPORTED, GIVES_WAY}:
            yield name
        for kind, section in field.metadata.get(VARIANTS, {}).items():
            yield from (f"{name}.{kind}.{below}" for below in _walk_keys(section))
        for arm in dict.fromkeys(typing.get_args(_hints(cls)[name]) or (_hints(cls)[name],)):
            if _is_section(arm):
                yield from (f"{name}.{below}" for below in _walk_keys(arm))


def _type_name(hint: Any) -> str:
    if _is_section(hint):
        return f"a section with the keys {_listed(_fields(hint))}"
    if typing.get_origin(hint) is list or hint is list:
        return "a list"
    if typing.get_origin(hint) is Literal:
        return f"one of {_listed(typing.get_args(hint))}"
    return "a mapping" if hint is dict else _NAMES.get(hint, str(hint))


def _shown(data: Any) -> str:
    """A value as a message shows it."""
    if data is None:
        return "nothing (null)"
    if isinstance(data, dict):
        return f"a mapping with {_listed(data)}"
    if isinstance(data, list):
        return f"a list of {len(data)}"
    shown = repr(data)
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}… ({len(shown)} characters)"
    return f"the text {shown}" if isinstance(data, str) else shown


def _quote_advice(kind: type, data: Any) -> str:
    if kind is str and not isinstance(data, (dict, list, type(None))):
        return ": put it in quotes"
    if kind is bool and isinstance(data, str) and data.lower() in {"true", "false"}:
        return ": remove the quotes"
    if kind in (int, float) and isinstance(data, str) and re.fullmatch(r"[-+]?0+[0-9]+", data):
        return f": without 0 at its front, {int(data)}"
    if kind in (int, float) and isinstance(data, str) and data.strip("+-").isdecimal():
        return ": remove the quotes"
    return ""


def _listed(names: Iterable[Any], most: int = 12) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown
