"""The alternatives of a regular expression, each with the expression that has only this one."""

from collections.abc import Iterator
from typing import NamedTuple


class _Group(NamedTuple):
    """Where a group's alternatives begin, and the places of the | between them."""

    begin: int
    bars: list[int]


def branches(pattern: str) -> Iterator[tuple[str, str]]:
    """(alternative, the pattern with its siblings left out) for each alternative at any depth.

    Nothing for a pattern without |. The pattern must be a valid one.
    """
    yield from _branches_within(pattern, 0, len(pattern))


def _branches_within(pattern: str, begin: int, end: int) -> Iterator[tuple[str, str]]:
    """Those of a part; an alternative within another is left alone with that one."""
    groups = [one for one in _groups(pattern) if begin <= one[0] and one[1] <= end]
    for first, last, bars in groups:
        if any(other[0] <= first and last <= other[1] for other in groups if other[0] != first):
            continue
        edges = [first, *(bar + 1 for bar in bars)]
        for start, stop in zip(edges, [*bars, last], strict=True):
            alternative = pattern[start:stop]
            alone = pattern[:first] + alternative + pattern[last:]
            yield alternative, alone
            yield from _branches_within(alone, first, first + len(alternative))


def _groups(pattern: str) -> Iterator[tuple[int, int, list[int]]]:
    """Begin, end and bars of each group that has any, the whole pattern being one."""
    open_groups = [_Group(0, [])]
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            at = _end_of_class(pattern, at)
        elif character == "(":
            open_groups.append(_Group(_begin_inside(pattern, at), []))
        elif character == "|":
            open_groups[-1].bars.append(at)
        elif character == ")":
            group = open_groups.pop()
            if group.bars:
                yield group.begin, at, group.bars
        at += 1
    if open_groups[0].bars:
        yield 0, len(pattern), open_groups[0].bars


def _end_of_class(pattern: str, at: int) -> int:
    """Where the ] of a character class is; directly behind [ or [^ it is a character."""
    at += 2 if pattern[at + 1] == "^" else 1
    at += pattern[at] == "]"
    while pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _begin_inside(pattern: str, at: int) -> int:
    """Behind ( and what says which kind of group it is: ?:, ?P<name>, ?=, ?!, ?<=, ?i:."""
    if pattern[at + 1 : at + 2] != "?":
        return at + 1
    if pattern.startswith(("(?P<", "(?<"), at) and pattern[at + 3] not in "=!":
        return pattern.index(">", at) + 1
    return (
        at
        + next(index for index, one in enumerate(pattern[at:]) if index > 1 and one in ":=!>)")
        + 1
    )
