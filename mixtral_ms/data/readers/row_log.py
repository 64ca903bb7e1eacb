"""What became of each row that was not taken as it is."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, get_args

from mixtral_ms.errors import UserError
from mixtral_ms.printable import printable

Fate = Literal["left out", "cut", "shortened"]

LISTING_SUFFIX = ".rows.jsonl"
"""Ends the name of the list of named rows beside an output."""
_FIRST_FEW = 5
_MOST_KEYS = 12
_LONGEST_REASON = 400


class UnfitRowError(ValueError):
    """A row that cannot be used; the message is the reason, without the row's number."""


@dataclass
class RowLog:
    """Counts rows and names those that were left out, cut or shortened.

    Rows read are rows taken and rows left out; cut (behind seq_length) and shortened (of turns that
    do not pair up) ones are taken. With a `file` each named row is a line of JSON in it.

    Attributes:
        read: rows seen.
        named: rows of each fate.
        first: the first few named rows, in words.
    """

    file: IO[str] | None = None
    read: int = 0
    named: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """Rows that became samples or documents."""
        return self.read - self.named.get("left out", 0)

    def add(self, path: Path, row: int, fate: Fate, reason: str) -> None:
        """Name a row; `row` counts from 0 in its file."""
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}… ({len(reason):,} characters)"
        self.named[fate] = self.named.get(fate, 0) + 1
        if len(self.first) < _FIRST_FEW:
            said = f"row {row} of {_unicode(Path(path.name))}: {fate}: {_unicode(reason)}"
            self.first.append(printable(said))
        if self.file is not None:
            entry = {"file": _unicode(path), "row": row, "fate": fate, "reason": _unicode(reason)}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def report(self) -> str:
        """Counts, the first few named rows, and whether most were left out, a line each."""
        counts = [f"{self.named.get(fate, 0):,} {fate}" for fate in get_args(Fate)]
        lines = [f"rows:      {self.read:,} read, {self.taken:,} taken; {', '.join(counts)}"]
        if 2 * self.taken < self.read:
            lines.append("           most rows were LEFT OUT: are they in a format that is read?")
        return "\n".join([*lines, *(f"           {one}" for one in self.first)])

    def nothing_usable(self, where: str) -> UserError:
        """The error for input of which no row can be used, with the reasons."""
        reasons = "".join(f"\n  {one}" for one in self.first)
        return UserError(f"none of the {self.read} rows of {where} can be used{reasons}")


@contextlib.contextmanager
def list_named_rows(path: Path, log: RowLog) -> Iterator[None]:
    """Lets the log write to `path`, beside records; without named rows it is not there after."""
    with open(path, "w", encoding="utf-8") as log.file:
        yield
    if not log.named:
        path.unlink()


def listed_keys(keys: Iterable[object]) -> str:
    """Names of keys or columns for a message, the first ones where there are many."""
    names = [f"{one!r:.40}" for one in keys]
    more = f" and {len(names) - _MOST_KEYS} more" if len(names) > _MOST_KEYS else ""
    return (", ".join(names[:_MOST_KEYS]) or "none") + more


def _unicode(text: str | Path) -> str:
    """What can be written anywhere: neither a file's name nor a row's key need be text."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return str(text).encode("utf-8", "backslashreplace").decode()
