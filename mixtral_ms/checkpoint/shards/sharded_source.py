"""A sharded checkpoint as if it were whole: regions are gathered from the parts that hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.regions import overlap, region_shape, relative, whole_region
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorInfo, TensorSource, carrier


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor."""

    region: Region
    rank: int
    source: TensorSource
    """The rank's own files: the part is its tensor of the same name."""


class ShardedSource(TensorSource):
    """The global tensors of a sharded checkpoint.

    Args:
        path: what the user named.
        infos: every tensor, with its global shape.
        parts: of each tensor; their regions fill it, replicas left out.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        parts: Mapping[str, Sequence[Part]],
    ) -> None:
        self.path, self.infos, self.parts = path, infos, parts

    def regions_of_ranks(self) -> list[dict[str, Region]]:
        """What each rank holds of each tensor."""
        world = 1 + max(part.rank for several in self.parts.values() for part in several)
        ranks: list[dict[str, Region]] = [{} for _ in range(world)]
        for name, several in self.parts.items():
            for part in several:
                ranks[part.rank][name] = part.region
        return ranks

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource; a view where one part holds all of it, else gathered into memory."""
        info = self.infos[name]
        region = whole_region(info.shape) if region is None else _bounded(region, info.shape)
        gathered = None
        for part in self.parts[name]:
            shared = overlap(part.region, region)
            if shared is None:
                continue
            values = part.source.read(name, relative(shared, part.region))
            if shared == region:
                return values
            if gathered is None:
                gathered = np.empty(region_shape(region), carrier(info.dtype))
            gathered[relative(shared, region)] = values
        return np.empty(region_shape(region), carrier(info.dtype)) if gathered is None else gathered


def _bounded(region: Region, shape: tuple[int, ...]) -> Region:
    """The region with every start and stop a number within the shape."""
    ends = [cut.indices(length) for cut, length in zip(region, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ends)
