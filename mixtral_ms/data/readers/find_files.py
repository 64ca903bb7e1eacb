"""Which files a pattern or a folder stands for, and what of it is no such file."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixtral_ms.data.readers.row_log import LISTING_SUFFIX
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.log import get_logger

_ANY_DEPTH = "**"
_SHOWN = 3


def find_inputs(pattern: str) -> list[Path]:
    """Files that a glob stands for, sorted by name, each once however many links lead to it.

    A file of exactly that name comes before what the pattern matches. Raises UserError when there
    is none, and for a match that is no file: a link that leads nowhere, a pipe, a device.
    """
    pattern = os.path.expanduser(pattern)
    literal = os.path.lexists(pattern)
    matches = [Path(pattern)] if literal else sorted(set(map(Path, _expand(pattern))))
    folders = [one for one in matches if one.is_dir()]
    files = [one for one in matches if one not in set(folders)]
    if not files and folders:
        raise UserError(
            f"--input_glob {pattern!r} is a folder; name its files: '{pattern.rstrip('/')}/*'"
        )
    if not files:
        raise _no_match(pattern)
    for one in files:
        _require_readable(one)
    if literal and glob.has_magic(pattern):
        get_logger().info("%s is read: a file has exactly this name, no pattern is tried", pattern)
    if folders and _ANY_DEPTH not in pattern:
        get_logger().warning(
            "not read: folders that match %r (%s); %s also means files in folders",
            pattern, _some(folders), f"{pattern.rsplit('/', 1)[0]}/{_ANY_DEPTH}/*",
        )  # fmt: skip
    return _each_once(files)


def files_in_folder(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files of a folder with these suffixes, sorted by name; what else is there is said.

    Hidden files are left out, and lists of left out rows that preprocessing wrote there. Raises
    UserError for a file of such a suffix that is none.
    """
    known = set(suffixes)
    files, others = [], []
    for one in sorted(folder.iterdir(), key=lambda one: one.name):
        if one.name.startswith("."):
            continue
        wanted = one.suffix.lower() in known and not one.name.endswith(LISTING_SUFFIX)
        if not wanted or one.is_dir():
            others.append(one)
            continue
        _require_readable(one)
        files.append(one)
    if files and others:
        get_logger().warning(
            "not read in %s: %s (read are %s files)",
            folder,
            _some(others),
            ", ".join(sorted(known)),
        )
    return _each_once(files)


def _expand(pattern: str) -> Iterator[str]:
    """What a glob matches; ** enters each folder once, whatever links lead back to it."""
    parts = pattern.split("/")
    if _ANY_DEPTH not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index(_ANY_DEPTH)
    rest = "/".join(parts[at + 1 :]) or "*"
    start = "/".join(parts[:at])
    seen: set[tuple[int, int]] = set()
    for top in [""] if at == 0 else glob.iglob(f"{start}/"):
        for folder in _folders_below(top, seen):
            yield from _expand(glob.escape(folder) + rest)


def _folders_below(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """`top` and the folders in it, at any depth, with / behind them; "" is the working folder."""
    found = os.stat(top or ".")
    if (found.st_dev, found.st_ino) in seen:
        return
    seen.add((found.st_dev, found.st_ino))
    yield top
    try:
        with os.scandir(top or ".") as entries:
            names = sorted(one.name for one in entries if one.is_dir())
    except OSError as error:
        raise UserError(f"the folder {top} cannot be read ({error.strerror})") from error
    for name in names:
        if not name.startswith("."):
            yield from _folders_below(f"{top}{name}/", seen)


def _require_readable(path: Path) -> None:
    require_file(path)
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (Permission denied)")


def _each_once(files: list[Path]) -> list[Path]:
    """Without those that are others again, by a link; a file's own name comes before a link."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=lambda one: (one.is_symlink(), len(one.parts), one)):
        found = path.stat()
        first = chosen.setdefault((found.st_dev, found.st_ino), path)
        if first != path:
            get_logger().warning("read once: %s is %s again, by a link", path, first)
    kept = set(chosen.values())
    return [one for one in files if one in kept]


def _no_match(pattern: str) -> UserError:
    hint = (
        "[ stands for one of several characters in a pattern, a [ itself is written [[]"
        if "[" in pattern
        else "quote a pattern with * so that the shell leaves it alone"
    )
    return UserError(
        f"--input_glob {pattern!r} matches no file (searched from {os.getcwd()}); {hint}"
    )


def _some(paths: list[Path]) -> str:
    names = ", ".join(one.name for one in paths[:_SHOWN])
    return names + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
