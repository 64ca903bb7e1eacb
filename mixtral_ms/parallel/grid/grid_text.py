"""The rank grid as text: `dp=2,mp=4,ep=2,pp=2,zero=1`."""

from mixtral_ms.config.loading.section_builder import nearest
from mixtral_ms.config.sections.parallel_section import GRID_SIZES, ParallelConfig
from mixtral_ms.errors import UserError

_SWITCHES = ("vocab_emb_dp", "zero")
_ALIASES = {"tp": "mp"} | {field: key for key, field in GRID_SIZES.items()}
_EXAMPLE = "dp=2,mp=4,ep=2,pp=2,zero=1"


def parse_grid(text: str, flag: str = "grid") -> tuple[ParallelConfig, bool]:
    """Read a grid: sizes dp, mp (or tp), ep, pp, cp, 1 unless given, and two switches, 0 or 1.

    Args:
        text: `key=value` pairs with commas between them. `zero` (0 unless given) cuts optimizer
            moments over their replicas; `vocab_emb_dp` (1 unless given) keeps the embedding whole.
        flag: what errors name.

    Returns:
        The grid, and whether `zero` is on.

    Raises:
        UserError: a key that is unknown or given twice, a value that is no size or switch.
    """
    values: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        key = _ALIASES.get(name, name)
        if key not in GRID_SIZES and key not in _SWITCHES:
            raise UserError(f"{flag} {text!r}: {_unknown(name)}")
        if key in values:
            raise UserError(f"{flag} {text!r}: {key} is given twice")
        values[key] = _number(value, f"{flag} {text!r}: {name}", switch=key in _SWITCHES)
    zero = bool(values.pop("zero", 0))
    grid = ParallelConfig(vocab_emb_dp=bool(values.pop("vocab_emb_dp", 1)))
    for key, size in values.items():
        setattr(grid, GRID_SIZES[key], size)
    return grid, zero


def format_grid(grid: ParallelConfig, *, zero: bool) -> str:
    """The text that `parse_grid` reads; cp, zero and vocab_emb_dp only where they say something."""
    sizes = {key: getattr(grid, field) for key, field in GRID_SIZES.items()}
    parts = [f"{key}={size}" for key, size in sizes.items() if key != "cp" or size > 1]
    parts += [] if grid.vocab_emb_dp else ["vocab_emb_dp=0"]
    parts += ["zero=1"] if zero else []
    return ",".join(parts)


def _unknown(name: str) -> str:
    known = [*GRID_SIZES, *_SWITCHES]
    if not name:
        return f"an empty key; write it as {_EXAMPLE}"
    close = nearest(name, [*known, *_ALIASES])
    hint = f"did you mean {close!r}? " if close else ""
    return f"unknown key {name!r}; {hint}known are {', '.join(known)}, as in {_EXAMPLE}"


def _number(value: str, what: str, *, switch: bool) -> int:
    allowed = "0 or 1" if switch else "a whole number of at least 1"
    if not (value.isascii() and value.isdecimal()) or (
        int(value) > 1 if switch else not int(value)
    ):
        raise UserError(f"{what} is {value!r}, but must be {allowed}")
    return int(value)
