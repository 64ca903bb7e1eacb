"""A rank's parts of the tensors of a source, as a source."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mixtral_ms.checkpoint.formats.regions import Region, region_shape
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource


class PartSource(TensorSource):
    """Nothing outside the parts is read.

    Args:
        source: of whole tensors.
        regions: of each tensor that there is a part of.
    """

    def __init__(self, source: TensorSource, regions: Mapping[str, Region]) -> None:
        self.path, self._source, self._regions = source.path, source, regions
        self.infos = {
            name: replace(info, shape=region_shape(regions[name])) if name in regions else info
            for name, info in source.infos.items()
        }

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """As `TensorSource.read`; a region is counted from the part's begin."""
        part = self._regions.get(name)
        if part is None or region is None:
            return self._source.read(name, region if part is None else part)
        cuts = (
            cut.indices(size)[:2] for cut, size in zip(region, self.infos[name].shape, strict=True)
        )
        moved = tuple(
            slice(own.start + begin, own.start + end)
            for own, (begin, end) in zip(part, cuts, strict=True)
        )
        return self._source.read(name, moved)
