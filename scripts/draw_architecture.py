#!/usr/bin/env python3
"""Draws docs/architecture.svg from the imports of mixtral_ms, and from nothing else.

A package stands below all that import it. An arrow is an import that no longer way implies.

    python scripts/draw_architecture.py          # writes the picture
    python scripts/draw_architecture.py --check  # says whether it is up to date
"""

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PICTURE = ROOT / "mixtral_ms", ROOT / "docs" / "architecture.svg"
FOUNDATION = "errors, log, files, progress"

WIDTH, MARGIN, LANE = 1000, 24, 50
TITLE, LINE, CHIP, GAP = 22, 17, 22, 34
CHARACTER = 6.6  # width of one at 11 px

Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Box:
    """A package in the picture, in pixels."""

    name: str
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Of its width."""
        return self.x + self.width / 2


def package_of(path: Path) -> str:
    """First folder of a module below mixtral_ms; files beside the folders are the foundation."""
    parts = path.relative_to(PACKAGE).parts
    if len(parts) > 1:
        return parts[0]
    return "cli" if path.stem in ("__init__", "__main__") else FOUNDATION


def imports() -> Graph:
    """package -> the packages that it imports."""
    found: Graph = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        package = package_of(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            first, *rest = node.module.split(".")
            if first == "mixtral_ms" and rest:
                target = rest[0] if (PACKAGE / rest[0]).is_dir() else FOUNDATION
                found[package] |= {target} - {package}
    return found


def levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """package -> one more than the highest of those that it imports."""
    result: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        result[name] = 1 + max((result[one] for one in graph.get(name, ())), default=-1)
    return result


def arrows(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports without those that a longer way implies; the foundation's are left out."""
    reachable: Graph = {}
    for name in TopologicalSorter(graph).static_order():
        direct = graph.get(name, set())
        reachable[name] = direct.union(*(reachable[one] for one in direct))
    return [
        (name, target)
        for name in sorted(graph)
        for target in sorted(graph[name])
        if target != FOUNDATION
        and not any(target in reachable[other] for other in graph[name] - {target})
    ]


def shelves(package: str) -> list[str]:
    """Folders of a package."""
    folders = (PACKAGE / package).glob("*/__init__.py")
    return sorted(path.parent.name for path in folders)


def description(package: str) -> str:
    """First line of the package's docstring."""
    if package == FOUNDATION:
        return "What everybody may use."
    text = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def wrapped(words: list[str], width: float, extra: float = 0) -> list[list[str]]:
    """Words in lines of at most `width` pixels; each word takes `extra` more than its text."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for word in words:
        size = len(word) * CHARACTER + extra
        if lines[-1] and used + size > width:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += size
    return lines


def inside(package: str, width: float) -> tuple[list[str], list[list[str]]]:
    """Lines of text, and of chips, of a box so wide."""
    text = [" ".join(line) for line in wrapped(description(package).split(), width - 24, CHARACTER)]
    chips = shelves(package)
    return text, wrapped(chips, width - 24, 22) if chips else []


def place_boxes(level: Mapping[str, int], at_lane: set[str]) -> tuple[dict[str, Box], float]:
    """Boxes from the top, a row a level, and the height of the picture; at_lane stand right."""
    boxes, y = {}, float(MARGIN)
    for row in sorted(set(level.values()), reverse=True):
        names = [name for name, at in level.items() if at == row]
        names.sort(key=lambda name: (name in at_lane, name))
        width = (WIDTH - 2 * MARGIN - LANE - GAP * (len(names) - 1)) / len(names)
        sizes = [inside(name, width) for name in names]
        height = 16 + TITLE + max(len(text) * LINE + len(chips) * CHIP for text, chips in sizes)
        for column, name in enumerate(names):
            boxes[name] = Box(name, MARGIN + column * (width + GAP), y, width, height)
        y += height + GAP
    return boxes, y - GAP + MARGIN


def draw_box(box: Box) -> list[str]:
    """SVG of a box with its text and chips."""
    text, chips = inside(box.name, box.width)
    x, y = box.x + 12, box.y + TITLE
    parts = [
        f'<rect class="package" x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" '
        f'height="{box.height:.0f}" rx="8"/>',
        f'<text class="name" x="{x:.0f}" y="{y:.0f}">{escape(box.name)}</text>',
    ]
    for line in text:
        y += LINE
        parts.append(f'<text class="what" x="{x:.0f}" y="{y:.0f}">{escape(line)}</text>')
    for row in chips:
        y, at = y + CHIP, x
        for chip in row:
            width = len(chip) * CHARACTER + 14
            parts.append(
                f'<rect class="shelf" x="{at:.0f}" y="{y - 13:.0f}" width="{width:.0f}" '
                f'height="18" rx="4"/><text class="chip" x="{at + 7:.0f}" y="{y:.0f}">'
                f"{escape(chip)}</text>"
            )
            at += width + 8
    return parts


def draw_arrow(upper: Box, lower: Box, level: Mapping[str, int], lane: int) -> str:
    """SVG of an arrow; past other rows it runs in the lane at the right."""
    if level[upper.name] - level[lower.name] == 1:
        path = f"M{upper.middle:.0f} {upper.y + upper.height:.0f} L{lower.middle:.0f} {lower.y:.0f}"
    else:
        right = WIDTH - LANE + lane
        y1, y2 = upper.y + upper.height / 2 + lane / 4, lower.y + lower.height / 2 - lane / 4
        path = (
            f"M{upper.x + upper.width:.0f} {y1:.0f} H{right} V{y2:.0f} H{lower.x + lower.width:.0f}"
        )
    return f'<path class="arrow" d="{path}"/>'


STYLE = """
  .paper { fill: #ffffff } text { font-family: DejaVu Sans, Verdana, sans-serif; fill: #1d2733 }
  .package { fill: #eef3f8; stroke: #7d95ad } .shelf { fill: #ffffff; stroke: #b9c8d6 }
  .name { font-size: 15px; font-weight: bold } .what { font-size: 11px }
  .chip { font-size: 10.5px } .arrow { fill: none; stroke: #4a6580; stroke-width: 1.4;
  marker-end: url(#tip) }
"""


def picture() -> str:
    """The whole SVG."""
    graph = imports()
    level = levels(graph)
    found = arrows(graph)
    at_lane = {name for arrow in found for name in arrow if level[arrow[0]] - level[arrow[1]] > 1}
    boxes, height = place_boxes(level, at_lane)
    parts = [part for box in boxes.values() for part in draw_box(box)]
    lane = 0
    for upper, lower in found:
        lane += 14 * (level[upper] - level[lower] > 1)
        parts.append(draw_arrow(boxes[upper], boxes[lower], level, lane))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" role="img">',
            "<title>Packages of mixtral_ms: whoever is above imports who is below</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#4a6580"/></marker>'
            "</defs>",
            '<rect class="paper" width="100%" height="100%"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> int:
    """Write the picture, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if outdated")
    if not parser.parse_args().check:
        PICTURE.write_text(picture(), encoding="utf-8")
        print(f"written: {PICTURE}")
        return 0
    if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture():
        return 0
    print(f"{PICTURE} is out of date: run python scripts/draw_architecture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
