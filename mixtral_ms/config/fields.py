"""How a configuration field says what it is besides its type and default."""

import dataclasses
from typing import Any

INERT = "inert"


def inert(default: Any, why: str) -> Any:
    """A key that is accepted for compatibility but changes nothing here.

    When a YAML sets it to something other than `default`, the log says so in one line with `why`.
    """
    metadata = {INERT: why}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
