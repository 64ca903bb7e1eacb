"""What is in a checkpoint, and what is wrong with it: `python -m mixtral_ms inspect`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo, TensorSource
from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, EXIT_FAILURE, EXIT_OK, run_command
from mixtral_ms.cli.support.inspection import Inspection, inspect_checkpoint, tensor_sha256
from mixtral_ms.printable import printable, printable_block
from mixtral_ms.progress import progress_bar

_DESCRIPTION = """\
Say what a checkpoint holds: format, tensors, how they are cut over ranks, hashes, and every problem
that is found. It is only read. The status is 1 when there is a problem, 2 when there is nothing.
"""
_EXAMPLE = """\
examples:
  python -m mixtral_ms inspect output/checkpoint                 # the latest in it
  python -m mixtral_ms inspect mixtral.ckpt --all --hash
  python -m mixtral_ms inspect Mixtral-8x7B-v0.1/                # a Hugging Face folder
  python -m mixtral_ms inspect cut/ --strategy output/strategy --json
"""
_LAYER = re.compile(r"(layers\.)(\d+)(\.)")


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    args = _parser().parse_args(argv)
    found = inspect_checkpoint(
        args.checkpoint, strategy=args.strategy, grid=args.grid, verify=args.verify
    )
    hashes = _hashes(found, found.source) if args.hash and found.source is not None else {}
    if args.json:
        print(json.dumps(_as_json(found, hashes), indent=1))
    else:
        print(_report(found, hashes, every_layer=args.all))
    return EXIT_FAILURE if found.problems else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixtral_ms inspect",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="file or folder: ours, of ranks, or of Hugging Face")
    add("--strategy", type=Path, metavar="PATH", help="strategy file or folder of its ranks")
    add("--grid", metavar="GRID", help="the same as a rank grid: dp=2,mp=4,ep=2,pp=2,zero=1")
    add("--all", action="store_true", help="a line for each layer's tensors (and with --hash)")
    add("--hash", action="store_true", help="SHA-256 of each tensor's values, whatever the format")
    add("--json", action="store_true", help="for machines: every tensor, no folding")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare everything with the manifest, where there is one (default: yes)",
    )
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _hashes(found: Inspection, source: TensorSource) -> dict[str, str]:
    total = sum(info.nbytes for info in found.tensors.values())
    with progress_bar(total, "hashing", "B", scale=True) as bar:
        hashes = {}
        for name, info in found.tensors.items():
            hashes[name] = tensor_sha256(source, name)
            bar.update(info.nbytes)
    return hashes


def _as_json(found: Inspection, hashes: dict[str, str]) -> dict[str, Any]:
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": info.dtype,
            **({"local_shape": list(found.local[name])} if name in found.local else {}),
            **({"sha256": hashes[name]} if name in hashes else {}),
        }
        for name, info in found.tensors.items()
    }
    return {
        "path": str(found.path),
        "format": found.file_format,
        "names": found.names,
        "ranks": found.ranks,
        "layout": found.layout,
        "bytes": found.size,
        "manifest": found.manifest,
        "step": found.state.get("step"),
        "tensors": tensors,
        "problems": found.problems,
    }


def _report(found: Inspection, hashes: dict[str, str], *, every_layer: bool) -> str:
    facts = {
        "checkpoint": printable(found.path),
        "format": f"{found.file_format or 'unknown'}, names: {found.names or 'unknown'}",
        "ranks": f"{found.ranks}" + (f", {found.layout}" if found.layout else ""),
        "tensors": f"{len(found.tensors)}, {found.size:,} bytes",
        "manifest": found.manifest,
    }
    if "step" in found.state:
        facts["step"] = str(found.state["step"])
    lines = [f"{key + ':':12}{value}" for key, value in facts.items()]
    lines += ["", *_table(found, hashes, every_layer=every_layer)] if found.tensors else []
    if found.problems:
        problems = (f"  {printable_block(one)}" for one in found.problems)
        lines += ["", f"problems: {len(found.problems)}", *problems]
    else:
        lines += ["", "problems: none"]
    return "\n".join(lines)


def _table(found: Inspection, hashes: dict[str, str], *, every_layer: bool) -> list[str]:
    """A line for each tensor; alike tensors of several layers are one line."""
    groups: dict[tuple[str, TensorInfo, tuple[int, ...] | None], list[str]] = {}
    for name, info in found.tensors.items():
        folded = name if every_layer or hashes else _LAYER.sub(r"\1*\3", name)
        groups.setdefault((folded, info, found.local.get(name)), []).append(name)
    rows = []
    for (_, info, local), names in groups.items():
        shape = f"{list(info.shape)}" + (f" in parts of {list(local)}" if local else "")
        rows.append((printable(_folded(names)), info.dtype, shape, hashes.get(names[0], "")))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(
            [*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]
        ).rstrip()
        for row in rows
    ]


def _folded(names: list[str]) -> str:
    """`model.layers.0-31.attention.wq.weight (32)`."""
    if len(names) == 1:
        return names[0]
    layers = sorted(int(match[2]) for name in names if (match := _LAYER.search(name)))
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return _LAYER.sub(rf"\g<1>{text}\3", names[0]) + f" ({len(names)})"


def command() -> int:
    """Entry point of `python -m`."""
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
