"""What became of each row that was not taken as it is."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, get_args

Fate = Literal["left out", "cut", "shortened"]

_FIRST_FEW = 5


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
        """Rows that became samples."""
        return self.read - self.named.get("left out", 0)

    def add(self, path: Path, row: int, fate: Fate, reason: str) -> None:
        """Name a row; `row` counts from 0 in its file."""
        self.named[fate] = self.named.get(fate, 0) + 1
        if len(self.first) < _FIRST_FEW:
            self.first.append(f"row {row} of {path.name}: {fate}: {reason}")
        if self.file is not None:
            entry = {"file": str(path), "row": row, "fate": fate, "reason": reason}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def report(self) -> str:
        """Counts and the first few named rows, a line each."""
        counts = [f"{self.named.get(fate, 0):,} {fate}" for fate in get_args(Fate)]
        lines = [f"rows:      {self.read:,} read, {self.taken:,} taken; {', '.join(counts)}"]
        return "\n".join([*lines, *(f"           {one}" for one in self.first)])
