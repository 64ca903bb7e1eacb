"""Proof that a conversion loses nothing: every weight is read once and written once."""

import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mixtral_ms.checkpoint.formats.regions import region_size
from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo
from mixtral_ms.convert.formats.tensor_layouts import TensorLayout
from mixtral_ms.convert.formats.weight_names import NOT_WEIGHTS

FLOATS = ("float32", "float16", "bfloat16")
"""What weights may be stored as."""
_SHOWN = 10
_NOT_WEIGHTS = re.compile("|".join(f"(?:{one})" for one in NOT_WEIGHTS))


def source_problems(
    infos: Mapping[str, TensorInfo], layouts: Sequence[TensorLayout]
) -> tuple[dict[str, str], list[str]]:
    """Compare what a source holds with what its format asks for.

    Returns:
        Tensor -> what is wrong with it: missing, surplus, of another shape or dtype; and the names
        of tensors that are no weights (optimizer state and the like), which are left out.
    """
    expected = {layout.name: layout.shape for layout in layouts}
    surplus = [name for name in infos if name not in expected]
    left_out = [name for name in surplus if _NOT_WEIGHTS.fullmatch(name)]
    problems = {name: "is missing" for name in expected if name not in infos}
    problems |= {
        name: "is no weight of Mixtral's" for name in surplus if not _NOT_WEIGHTS.fullmatch(name)
    }
    for name, info in infos.items():
        if name in expected and info.shape != expected[name]:
            problems[name] = f"has shape {info.shape}, expected is {expected[name]}"
        elif name in expected and info.dtype not in FLOATS:
            problems[name] = _wrong_dtype(info.dtype)
    return problems, left_out


def _wrong_dtype(dtype: str) -> str:
    text = f"has dtype {dtype}, expected is a 16 or 32 bit float"
    return f"{text}: save it as float32 first" if dtype == "float64" else text


def problems_text(what: str, problems: Mapping[str, str]) -> str:
    """A message with up to ten of the problems; `what` is its beginning."""
    lines = [f"{name} {problem}" for name, problem in problems.items()]
    more = len(lines) - _SHOWN
    text = "\n  ".join([f"{what}, {len(lines)} tensors:", *lines[:_SHOWN]])
    return text + (f"\n  and {more} more" if more > 0 else "")


def require_same_atoms(source: Iterable[TensorLayout], target: Iterable[TensorLayout]) -> None:
    """Raises ValueError unless both hold every atom exactly once, with nothing beside them."""
    sides = []
    for layouts in (source, target):
        atoms = Counter(one.atom for layout in layouts for one in layout.slots)
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
            size = sum(region_size(one.region) for one in layout.slots)
            if (read := self._counts[layout.name]) != size:
                raise RuntimeError(f"{read} of {size} values of {layout.name} were converted")
