#!/usr/bin/env python3
"""Checks the types of mixtral_ms with mypy, against a list of known errors that only shrinks.

    python scripts/check_types.py            # a new error fails; so does a listed one that is gone
    python scripts/check_types.py --update   # takes what is gone off the list, adds nothing to it

The list, scripts/mypy_baseline.txt, has a line for each error, without its line number: code moves.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "scripts/mypy_baseline.txt"
HEADER = "# Errors of mypy that are known; scripts/check_types.py lets this list only shrink.\n"


@dataclass(frozen=True)
class Finding:
    """An error that mypy found."""

    path: str
    line: int
    message: str
    code: str

    @property
    def key(self) -> str:
        """What the list has of it."""
        return f"{self.path}: {self.message} [{self.code}]"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message} [{self.code}]"


def run_mypy(root: Path, options: Sequence[str]) -> list[Finding]:
    """The errors in what root's pyproject.toml names.

    Raises:
        SystemExit: mypy did not get through.
    """
    command = [sys.executable, "-m", "mypy", "--output=json", "--no-error-summary", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or done.stderr:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(2)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        Finding(one["file"], one["line"], one["message"], one["code"])
        for one in found
        if one["severity"] == "error"
    ]


def read_baseline(path: Path) -> list[str]:
    """The known errors."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def compare(errors: Iterable[Finding], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """(errors that are new, with their lines; known ones that are gone).

    Where a message is there more often than it is known, all its lines are given: which of them
    is new cannot be told.
    """
    errors, known = list(errors), Counter(known)
    found = Counter(error.key for error in errors)
    new = [str(error) for error in errors if found[error.key] > known[error.key]]
    return new, sorted((known - found).elements())


def check(root: Path, update: bool, options: Sequence[str] = ()) -> int:
    """Prints what differs from the list, and how many errors are left; gives the exit status."""
    baseline = root / BASELINE
    known = read_baseline(baseline)
    new, gone = compare(run_mypy(root, options), known)
    for line in new:
        print(f"new: {line}")
    if update and gone:
        left = sorted((Counter(known) - Counter(gone)).elements())
        baseline.write_text(HEADER + "".join(f"{line}\n" for line in left), encoding="utf-8")
        print(f"{len(gone)} taken off {BASELINE}")
    elif gone:
        print(*(f"gone: {line}" for line in gone), sep="\n")
        print(f"take them off {BASELINE}: python scripts/check_types.py --update")
    print(f"types: {len(known) - len(gone)} known errors, {len(new)} lines with new ones")
    return int(bool(new or (gone and not update)))


def main(argv: Sequence[str]) -> int:
    """Parses and checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="take what is gone off the list")
    parser.add_argument("--root", type=Path, default=ROOT, help="where pyproject.toml is")
    parser.add_argument("options", nargs="*", help="mypy's own, after --")
    given = parser.parse_args(argv)
    return check(given.root, given.update, given.options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
