"""How a configuration field says what it is besides its type and default."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

INERT = "inert"
UNSUPPORTED = "unsupported"
VARIANTS = "variants"

Dtype = Literal["float32", "float16", "bfloat16"]
"""Names of the number formats a tensor may have."""


def inert(default: Any, why: str) -> Any:
    """A key that is accepted for compatibility but changes nothing here.

    When a YAML sets it to something other than `default`, the log says so in one line with `why`.
    """
    return dataclasses.field(default=default, metadata={INERT: why})


def unsupported(default: Any, why: str) -> Any:
    """A key that would change the result but is not built: only `default` is accepted."""
    return dataclasses.field(default=default, metadata={UNSUPPORTED: why})


def variants(table: Mapping[str, type]) -> Any:
    """A list of sections, each of the dataclass that `table` names for its `type`."""
    return dataclasses.field(default_factory=list, metadata={VARIANTS: dict(table)})
