"""Proof that a conversion loses nothing: every weight is read once and written once."""

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mixtral_ms.checkpoint.regions import region_size
from mixtral_ms.checkpoint.tensors import TensorInfo
from mixtral_ms.convert.names import NOT_WEIGHTS
from mixtral_ms.convert.placements import TensorLayout
from mixtral_ms.errors import UserError

FLOATS = ("float32", "float16", "bfloat16")
"""What weights may be stored as."""
_SHOWN = 10
_NOT_WEIGHTS = re.compile("|".join(f"(?:{one})" for one in NOT_WEIGHTS))


def match_source(
    infos: Mapping[str, TensorInfo], layouts: Sequence[TensorLayout], where: object
) -> list[str]:
    """Compare what a source holds with what its format asks for.

    Returns:
        Names of tensors that are no weights (optimizer state and the like) and are left out.

    Raises:
        UserError: a tensor is missing, surplus or of another shape; up to ten are named.
    """
    expected = {layout.name: layout.shape for layout in layouts}
    surplus = [name for name in infos if name not in expected]
    left_out = [name for name in surplus if _NOT_WEIGHTS.fullmatch(name)]
    problems = [f"{name} is missing" for name in expected if name not in infos]
    problems += [
        f"{name} is no weight of Mixtral's" for name in surplus if not _NOT_WEIGHTS.fullmatch(name)
    ]
    for name, shape in expected.items():
        if name in infos and infos[name].shape != shape:
            problems.append(f"{name} has shape {infos[name].shape}, expected is {shape}")
        elif name in infos and infos[name].dtype not in FLOATS:
            problems.append(
                f"{name} has dtype {infos[name].dtype}, expected is a 16 or 32 bit float"
            )
    if problems:
        more = len(problems) - _SHOWN
        shown = "\n  ".join(problems[:_SHOWN])
        raise UserError(
            f"{where}: {len(problems)} tensors are not as they should be:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    return left_out


def require_same_atoms(source: Iterable[TensorLayout], target: Iterable[TensorLayout]) -> None:
    """Raises ValueError unless both hold every atom exactly once, with nothing beside them."""
    sides = []
    for layouts in (source, target):
        atoms = Counter(one.atom for layout in layouts for one in layout.placements)
        if twice := [atom for atom, count in atoms.items() if count > 1]:
            raise ValueError(f"{twice[0]} would be converted twice")
        sides.append(atoms.keys())
    if sides[0] != sides[1]:
        raise ValueError(f"only one of the formats holds {sorted(sides[0] ^ sides[1])[0]}")


class ReadCounts:
    """How many values of each source tensor were read; threads may share it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        """Count values, by tensor."""
        with self._lock:
            self._counts.update(counts)

    def require_all_once(self, layouts: Iterable[TensorLayout]) -> None:
        """Raises RuntimeError unless exactly as many were read of every tensor as it has."""
        for layout in layouts:
            size = sum(region_size(one.region) for one in layout.placements)
            if (read := self._counts[layout.name]) != size:
                raise RuntimeError(f"{read} of {size} values of {layout.name} were converted")
