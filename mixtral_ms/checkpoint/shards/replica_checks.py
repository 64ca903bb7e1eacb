"""Whether a strategy fits the values: parts it calls replicas are equal, others are not.

Shapes alone do not tell a wrong strategy of the same number of ranks. Values do: under it, ranks
that hold different parts are taken for replicas, or replicas for different parts.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.regions import (
    region_shape,
    region_size,
    row_major_blocks,
    whole_region,
)
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorInfo
from mixtral_ms.checkpoint.shards.sharded_source import Part
from mixtral_ms.errors import UserError

_SAMPLE_VALUES = 16 << 10
"""Compared at the begin and at the end of each part; one of twice as many is compared in full."""
_PIECE_VALUES = 2 << 20
_FEW_BYTES = 4
"""A constant tensor has no more different bytes in its values."""
_WRONG = "it is not this checkpoint's strategy"


def check_parts(
    path: Path,
    infos: Mapping[str, TensorInfo],
    parts: Mapping[str, Sequence[Part]],
    *,
    every_replica: bool,
) -> None:
    """Compare the parts of every tensor.

    Args:
        path: what the user named.
        infos: every tensor, with its global shape.
        parts: of every tensor.
        every_replica: compare replicas value by value, not only a sample at begin and end.

    Raises:
        UserError: replicas differ, or all cut matrices have equal parts.
    """
    repeated: list[str] = []
    distinct = False
    for name, several in parts.items():
        samples = {part.rank: _sample(name, part) for part in several}
        _compare_replicas(path, name, several, samples)
        if every_replica:
            digests = {part.rank: _digest(name, part) for part in several if _shared(part, several)}
            _compare_replicas(path, name, several, digests)
        if len(infos[name].shape) <= 2 and (same := _equal_parts(several, samples)) is not None:
            distinct = distinct or not same
            repeated += [f"{name} of rank {same[0]} and rank {same[1]}"] if same else []
    if repeated and not distinct:
        raise UserError(
            f"{path}: {repeated[0]} hold the same values, and so with every other matrix, where "
            f"the strategy says that they are different parts: {_WRONG}"
        )


def _shared(part: Part, several: Sequence[Part]) -> bool:
    return sum(one.region == part.region for one in several) > 1


def _compare_replicas(
    path: Path, name: str, several: Sequence[Part], values: Mapping[int, bytes]
) -> None:
    first: dict[tuple, int] = {}
    for part in several:
        if part.rank not in values:
            continue
        holder = first.setdefault(_key(part.region), part.rank)
        if values[part.rank] != values[holder]:
            raise UserError(
                f"{path}: {name} differs between rank {holder} and rank {part.rank}, where the "
                f"strategy says that they hold the same part: {_WRONG}, ranks of two checkpoints "
                "are mixed, or a file is damaged"
            )


def _equal_parts(
    several: Sequence[Part], samples: Mapping[int, bytes]
) -> tuple[int, int] | tuple[()] | None:
    """Two ranks whose different parts hold equal values, () if there are none.

    None where it says nothing: the tensor is not cut, or a part's values are all the same.
    """
    cut = {_key(part.region): part.rank for part in several}
    if len(cut) == 1 or any(len(set(samples[rank])) <= _FEW_BYTES for rank in cut.values()):
        return None
    seen: dict[bytes, int] = {}
    for rank in sorted(cut.values()):
        if samples[rank] in seen:
            return seen[samples[rank]], rank
        seen[samples[rank]] = rank
    return ()


def _key(region: Region) -> tuple[tuple[int, int], ...]:
    return tuple((cut.start, cut.stop) for cut in region)


def _sample(name: str, part: Part) -> bytes:
    """Values from the begin and from the end of a part."""
    whole = whole_region(region_shape(part.region))
    if region_size(whole) <= 2 * _SAMPLE_VALUES:
        return np.ascontiguousarray(part.source.read(name)).tobytes()
    first = next(row_major_blocks(whole, _SAMPLE_VALUES))
    last = tuple(
        slice(end.stop - (cut.stop - cut.start), end.stop)
        for cut, end in zip(first, whole, strict=True)
    )
    ends = [part.source.read(name, block) for block in (first, last)]
    return b"".join(np.ascontiguousarray(values).tobytes() for values in ends)


def _digest(name: str, part: Part) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces(name, part):
        digest.update(np.ascontiguousarray(piece).data)
    return digest.digest()


def pieces(name: str, part: Part) -> Iterator[np.ndarray]:
    """All values of a part, row-major."""
    whole = whole_region(region_shape(part.region))
    for block in row_major_blocks(whole, _PIECE_VALUES):
        yield part.source.read(name, block)
