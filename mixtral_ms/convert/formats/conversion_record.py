"""The record that a conversion leaves with its output: what it holds, every tensor's hash."""

from pathlib import Path

from mixtral_ms.checkpoint.store.manifest import STATE
from mixtral_ms.convert.formats.foreign_config import RECORD_SUFFIX, read_json
from mixtral_ms.convert.formats.weight_names import FORMATS

FOLDER_RECORD = "conversion.json"
FORMAT_KEY = "weights_format"


def recorded_format(source: Path) -> str | None:
    """The format that a record with the weights says they are in."""
    paths = [source / STATE, source / FOLDER_RECORD]
    if not source.is_dir():
        paths = [source.with_name(source.name + RECORD_SUFFIX), source.parent.parent / STATE]
    for path in paths:
        if path.is_file():
            name = read_json(path).get(FORMAT_KEY)
            return name if name in FORMATS else None
    return None
