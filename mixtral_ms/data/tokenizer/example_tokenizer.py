"""The tokenizer.model of Mixtral 8x7B as the package `mistral-common` ships it."""

from importlib.util import find_spec
from pathlib import Path

from mixtral_ms.errors import UserError

_PACKAGE = "mistral_common"
_FILE = "tokenizer.model.v1"


def find_example_tokenizer() -> Path:
    """Path of the real Mixtral tokenizer (32,000 pieces) inside the installed `mistral-common`.

    The package is located, not imported. Raises UserError with the pip command when it is absent.
    """
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / _FILE
        if path.is_file():
            return path
    raise UserError(
        f"no Mixtral tokenizer: the package mistral-common, which ships {_FILE}, is not installed; "
        "run: pip install mistral-common (or pass --model_file with your own tokenizer.model)"
    )
