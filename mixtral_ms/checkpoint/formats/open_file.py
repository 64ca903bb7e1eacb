"""Opening a file of tensors, whatever its format, or several files as one."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.file_formats import FILE_FORMATS, START_BYTES, format_of
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError, Region, TensorSource
from mixtral_ms.checkpoint.formats.torch_format import TorchZipSource
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import (
    PICKLE_KIND,
    SAFETENSORS_KIND,
    ZIP_KIND,
    kind_of,
    not_as_wanted,
    require_file,
)

_WANTED = "a file of weights"
_PART = re.compile(r"(?P<whole>.+)-split(?P<number>\d+)")


def open_tensors(path: Path) -> TensorSource:
    """The tensors of a file in any format of FILE_FORMATS.

    The beginning of the file decides, then its suffix. Of a PyTorch file that was split into
    `name-split0`, `name-split1`, ... the name or any part stands for all.

    Raises:
        UserError: there is no such file, or it is none that can be read.
        DamagedFileError: it is not what its format says.
    """
    if parts := _split_parts(path):
        return TorchZipSource(parts)
    require_file(path)
    with open(path, "rb") as file:
        start = file.read(START_BYTES)
    begun = next((one for one in FILE_FORMATS.values() if one.starts(start)), None)
    found, kind = begun or format_of(path), kind_of(path)
    if kind is not None and begun is None and kind is not PICKLE_KIND:
        raise not_as_wanted(path, _WANTED, kind.name)
    if found is None:
        suffixes = ", ".join(suffix for one in FILE_FORMATS.values() for suffix in one.suffixes)
        raise UserError(
            f"{path} is not a file of tensors that can be read; these are {suffixes} "
            "and PyTorch files in parts (name-split0, name-split1, ...)"
        )
    try:
        return found.read(path)
    except DamagedFileError as error:
        if kind in (None, SAFETENSORS_KIND, ZIP_KIND):
            raise
        raise not_as_wanted(path, _WANTED, str(error)) from None


def _split_parts(path: Path) -> list[Path]:
    """All parts of a split file, in order; empty when `path` is none.

    Raises:
        UserError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if path.is_file() and not match:
        return []
    whole = match["whole"] if match else path.name
    found = {}
    for part in path.parent.glob("*"):
        if (one := _PART.fullmatch(part.name)) and one["whole"] == whole:
            found[int(one["number"])] = part
    missing = sorted(set(range(max(found, default=0))) - set(found))
    if missing:
        raise UserError(
            f"{path.parent / whole}-split{missing[0]} is missing: the parts there are "
            f"{', '.join(found[number].name for number in sorted(found))}"
        )
    return [found[number] for number in sorted(found)]


class MergedSource(TensorSource):
    """Several sources as one.

    Args:
        path: what the user named.
        sources: read in this order.
        owners: which of them a tensor is read from, where an index says so.

    Raises:
        UserError: a tensor that no index decides over is in two of them, with different values; or
            a source lacks what the index says it has.
    """

    def __init__(
        self,
        path: Path,
        sources: Sequence[TensorSource],
        owners: Mapping[str, TensorSource] | None = None,
    ) -> None:
        self.path, self.infos = path, {}
        self._owners: dict[str, TensorSource] = {}
        owners = owners or {}
        for source in sources:
            for name, info in source.infos.items():
                if owners.get(name, source) is not source:
                    continue
                if name in self._owners:
                    _require_equal(name, self._owners[name], source)
                self._owners[name], self.infos[name] = source, info
        if lost := next((name for name in owners if name not in self._owners), None):
            raise UserError(
                f"{owners[lost].path} lacks the tensor {lost!r}, by the index it is there"
            )

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource."""
        return self._owners[name].read(name, region)


def _require_equal(name: str, one: TensorSource, other: TensorSource) -> None:
    """A tensor that lies in two files must be the same in both."""
    same = one.infos[name] == other.infos[name]
    if not same or one.read(name).tobytes() != other.read(name).tobytes():
        raise UserError(f"tensor {name!r} is in {one.path} and, with other values, in {other.path}")
