"""One flag of a command and the keys of the YAML that it sets."""

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag and the key (or keys) it sets."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    kind: type
    help: str
    many: bool = False
    """Takes several values."""
    repeated: bool = False
    """May be given several times."""
    choices: tuple[str, ...] | None = None

    @property
    def attribute(self) -> str:
        """Its name in a parsed command line."""
        return self.names[0].removeprefix("--")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add it to a parser; a switch without a value means True."""
        switch = self.kind is bool
        shape: dict[str, Any] = {"nargs": "+" if self.many else "?" if switch else None}
        if switch:
            shape["const"] = True
        parser.add_argument(
            *self.names,
            **shape,
            action="append" if self.repeated else "store",
            type=true_or_false if switch else self.kind,
            choices=self.choices,
            metavar=None if self.choices else _METAVARS[self.kind],
            help=self.help,
        )


_METAVARS = {bool: "True|False", int: "N", float: "X", str: "TEXT"}


def flag(name: str, key: str, kind: type, text: str, **more: Any) -> Flag:
    """A flag; `also` are other names of it, `keys` more keys that it sets."""
    names = (name, *more.pop("also", ()))
    return Flag(
        tuple(f"--{one}" for one in names), (key, *more.pop("keys", ())), kind, text, **more
    )


def true_or_false(text: str) -> bool:
    """A flag's value."""
    if text.lower() not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"{text!r} given: write True or False")
    return text.lower() == "true"


def whole_number(text: str) -> int:
    """A flag's value of at least 1."""
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
