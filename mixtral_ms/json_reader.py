"""JSON of files and lines, read in one place: what is no sound JSON never gets further.

Beyond Python's decoder this refuses names that occur twice in an object, nesting that later code
could not follow, and, outside rows of data, what JSON does not have: NaN, Infinity, numbers beyond
float64 and halves of characters (lone surrogates).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_as_wanted, not_utf8, require_file

MAX_DEPTH = 200
"""Lists and objects within one another."""
_MAX_BYTES = 1 << 28
_BOM = "\ufeff"

JsonShape: TypeAlias = "type | None | Sequence[JsonShape] | Mapping[str | type[str], JsonShape]"
"""What `require_shape` compares a value with."""


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError naming the file and the place or the key."""
    require_file(path)
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; JSON of more than {_MAX_BYTES} is not read")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, error) from None
    try:
        return decode_json(text.removeprefix(_BOM))
    except ValueError as error:
        raise not_as_wanted(path, "JSON", str(error)) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file and the place or the key."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {_named(data)}, not an object of keys")
    return data


def parse_json(text: str, where: str) -> Any:
    """The value that a text spells. Raises UserError that begins with `where`."""
    try:
        return decode_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def decode_json(text: str, *, row: bool = False) -> Any:
    """The value that a text spells. Raises ValueError saying why it is none.

    Args:
        text: one JSON value.
        row: it is data, whose texts are looked at when they are used: NaN, Infinity and lone
            surrogates are left to whoever uses them.
    """
    try:
        value = (ROW_DECODER if row else _DECODER).decode(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(_where_not_finite(text) or why_no_json(error)) from None
    check_depth(text, value)
    if not row and "\\u" in text:
        _check_characters(value)
    return value


def _where_not_finite(text: str) -> str | None:
    """The key that holds NaN, Infinity or more than float64 can, in words."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    level = [("", value)]
    for _ in range(MAX_DEPTH):
        for key, one in level:
            if isinstance(one, float) and not math.isfinite(one):
                return f"{key or 'the value'} is NaN, infinite or beyond float64"
        level = [
            (f"{key}.{name}".lstrip("."), item) for key, one in level for name, item in _keys(one)
        ]
    return None


def _keys(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def why_no_json(error: Exception) -> str:
    """What a decoder of this module stumbled over, in words."""
    if isinstance(error, RecursionError):
        return f"nested more than {MAX_DEPTH} deep"
    if str(error).startswith("Exceeds the limit"):
        return "a number has more digits than can be read"
    return str(error)


def check_depth(text: str, value: Any) -> None:
    """Raise ValueError when a value is nested too deep for what comes after; `text` spells it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for one in level for item in _items(one)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def require_shape(
    value: object, shape: JsonShape, where: str, error: type[Exception] = UserError
) -> None:
    """Raise `error`, naming the key, unless a value read from JSON is of a shape.

    A shape is a type (`int` is no bool, `float` takes whole numbers too), None, a list of one shape
    (any number of such items), a tuple (any of them), or an object: {"key": shape} must have the
    key, {"key?": shape} may, {str: shape} is any key; further keys are allowed.
    """
    if not _is_of(value, shape):
        raise error(f"{where}: {_named(value)}, but must be {_words(shape)}")
    if isinstance(shape, list) and isinstance(value, list):
        for number, item in enumerate(value):
            require_shape(item, shape[0], f"{where}[{number}]", error)
    elif isinstance(shape, Mapping) and isinstance(value, dict):
        _require_keys(value, shape, where, error)
    elif isinstance(shape, tuple):
        one = next(one for one in shape if _is_of(value, one))
        require_shape(value, one, where, error)


def _require_keys(
    value: dict[str, Any],
    shape: Mapping[str | type[str], JsonShape],
    where: str,
    error: type[Exception],
) -> None:
    for key, one in shape.items():
        if not isinstance(key, str):
            for name, item in value.items():
                require_shape(item, one, f"{where}: {name!r}", error)
        elif (name := key.removesuffix("?")) in value:
            require_shape(value[name], one, f"{where}: {name!r}", error)
        elif name == key:
            raise error(f"{where}: lacks {name!r}")


def _is_of(value: object, shape: JsonShape) -> bool:
    if isinstance(shape, tuple):
        return any(_is_of(value, one) for one in shape)
    if isinstance(shape, Mapping):
        return isinstance(value, dict)
    if isinstance(shape, Sequence):
        return isinstance(value, list)
    if shape is None or isinstance(value, bool):
        return value is None if shape is None else shape is bool
    return isinstance(value, int | float if shape is float else shape)


def _words(shape: JsonShape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, Mapping):
        return "an object"
    if isinstance(shape, Sequence):
        return "a list"
    return _TYPES[type(None) if shape is None else shape]


_TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _named(value: object) -> str:
    return _TYPES.get(type(value), type(value).__name__)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has {twice!a} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is beyond float64")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text has the lone surrogate {error.object[error.start]!a}") from None


ROW_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""For rows of data, with names that occur once."""
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant
)
