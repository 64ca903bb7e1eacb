"""How a configuration field says what it is besides its type and default."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar, get_args

INERT = "inert"
UNSUPPORTED = "unsupported"
VARIANTS = "variants"
ONE_OF = "one_of"
DERIVED = "derived"
GIVES_WAY = "gives_way"
ADVICE = "advice"

T = TypeVar("T")

Dtype = Literal["float32", "float16", "bfloat16"]
"""Names of the number formats a tensor may have."""


def is_dtype(name: str) -> TypeGuard[Dtype]:
    """Whether a format of numbers is one that a configuration may name."""
    return name in get_args(Dtype)


def inert(default: Any, why: str) -> Any:
    """A key that is accepted for compatibility but changes nothing here.

    When a YAML sets it to something other than `default`, the log says so in one line with `why`.
    """
    return dataclasses.field(default=default, metadata={INERT: why})


def unsupported(default: Any, why: str) -> Any:
    """A key that would change the result but is not built: only `default` is accepted."""
    return dataclasses.field(default=default, metadata={UNSUPPORTED: why})


def gives_way(key: str, default: Any = None) -> Any:
    """A key that `key`, the full path of another, wins over: hints name that one."""
    return dataclasses.field(default=default, metadata={GIVES_WAY: key})


def advised(default: T, advice: str) -> T:
    """A key with words of its own for whoever gives it a value of another type."""
    field: Any = dataclasses.field(default=default, metadata={ADVICE: advice})
    return field


def one_of(names: Sequence[str], default: str) -> Any:
    """A text that must be one of `names`, to which others may be added while the program runs."""
    return dataclasses.field(default=default, metadata={ONE_OF: names})


def variants(table: Mapping[str, type]) -> Any:
    """A list of sections, each of the dataclass that `table` names for its `type`."""
    return dataclasses.field(default_factory=list, metadata={VARIANTS: dict(table)})


def derived(rule: Callable[[Any], T]) -> T:
    """A key that may be left empty (null): then `rule` of its section says the value.

    The field's type is that of the value. The section's `__post_init__` calls `fill_derived`, so
    nobody meets it empty.
    """
    empty: Any = None
    return dataclasses.field(default=empty, metadata={DERIVED: rule})


def fill_derived(section: Any) -> None:
    """Give the fields of a section that are left empty the values that follow from the others."""
    for field in dataclasses.fields(section):
        rule = field.metadata.get(DERIVED)
        if rule is not None and getattr(section, field.name) is None:
            setattr(section, field.name, rule(section))
