"""Boxes in a tensor: where two meet, one inside another, and boxes cut into bounded pieces."""

import itertools
import math
from collections.abc import Iterator

from mixtral_ms.checkpoint.formats.tensor_source import Region


def whole_region(shape: tuple[int, ...]) -> Region:
    """The region that is the whole tensor."""
    return tuple(slice(0, length) for length in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """Shape of what a region holds."""
    return tuple(cut.stop - cut.start for cut in region)


def region_size(region: Region) -> int:
    """How many values a region holds."""
    return math.prod(region_shape(region))


def overlap(first: Region, second: Region) -> Region | None:
    """The region in both; None where they share nothing."""
    shared = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop))
        for a, b in zip(first, second, strict=True)
    )
    return shared if all(cut.start < cut.stop for cut in shared) else None


def relative(region: Region, outer: Region) -> Region:
    """`region`, which lies in `outer`, counted from where `outer` starts."""
    return tuple(
        slice(cut.start - base.start, cut.stop - base.start)
        for cut, base in zip(region, outer, strict=True)
    )


def row_major_blocks(region: Region, most_values: int) -> Iterator[Region]:
    """Cut a region into regions whose values, one after the other, are its own in row-major order.

    Args:
        region: what to cut.
        most_values: none holds more; at least 1.
    """
    if region_size(region) == 0:
        return
    axis, inside = -1, region_size(region)
    while inside > most_values:  # the first axis below which all fits
        axis += 1
        inside //= region[axis].stop - region[axis].start
    # Single indices on the axes before that one, rows of it, and all on those after.
    steps = [1] * axis + [most_values // inside] if axis >= 0 else []
    starts = [range(cut.start, cut.stop, step) for cut, step in zip(region, steps, strict=False)]
    for corner in itertools.product(*starts):
        cuts = [
            slice(start, min(start + step, cut.stop))
            for start, step, cut in zip(corner, steps, region, strict=False)
        ]
        yield (*cuts, *region[len(steps) :])
