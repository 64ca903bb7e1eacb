"""Cut a checkpoint for other devices, or merge it: `python -m mixtral_ms transform`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Lock

from mixtral_ms.checkpoint.formats.file_formats import written_formats
from mixtral_ms.checkpoint.reshard.transform_checkpoint import (
    TransformOptions,
    TransformSummary,
    transform,
)
from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, run_command
from mixtral_ms.config import load_config
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.printable import shell_word
from mixtral_ms.progress import progress_bar

_DESCRIPTION = """\
Write a checkpoint again as another strategy cuts it: parameters and optimizer state, bit for bit.
A strategy is a file or folder that a run has left (output/strategy), or a rank grid as text;
without one a checkpoint is whole. The source is only read. The target appears when it is complete,
with a manifest of hashes and its strategy files; what was interrupted leaves nothing there and
starts afresh.
"""
_EXAMPLE = """\
examples:
  merge what a run saved, for evaluation and inference:
    python tools/transform_ckpt.py --src_ckpt_strategy output/strategy/ \\
        --src_ckpt_dir output/checkpoint/ --dst_ckpt_dir merged/ --prefix mixtral_
  cut a whole checkpoint for 8 devices, optimizer state over the data-parallel ranks:
    python tools/transform_ckpt.py --src_ckpt_dir mixtral.ckpt --dst_ckpt_dir cut/ \\
        --dst_strategy dp=2,mp=2,ep=2,pp=2,zero=1
  from one grid to another:
    python tools/transform_ckpt.py --src_ckpt_dir cut/ --src_ckpt_strategy cut/strategy \\
        --dst_ckpt_dir cut_4/ --dst_strategy mp=4,ep=4

rank grids: dp data, mp model, ep expert and cp context parallel, pp pipeline stages; zero=1 cuts
optimizer moments over replicas; vocab_emb_dp=0 cuts the embedding over model parallel.
Devices are dp*mp*cp*pp.

Without a manifest beside the source, a damaged file shows only where it is cut short, where ranks
contradict each other, or in the samples of replicas; --check_replicas compares all of them.
"""


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    arguments = vars(_parser().parse_args(argv))
    options = TransformOptions(
        **{one.name: arguments[one.name] for one in fields(TransformOptions)}
    )
    known = _network(arguments["config"])
    with _progress() as start:
        summary = transform(options, known, start)
    print(_report(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transform_ckpt.py",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--src_ckpt_dir",
        type=Path,
        required=True,
        metavar="PATH",
        help="folder with rank_0/, rank_1/, …, one of our checkpoints, or a whole file",
    )
    add("--dst_ckpt_dir", type=Path, required=True, metavar="PATH", help="folder to write")
    add(
        "--src_ckpt_strategy",
        type=_path_or_none,
        metavar="PATH",
        help="strategy file or folder of the source (default: the source is whole, or its own)",
    )
    add("--src_strategy", metavar="GRID", help="the same as a rank grid: dp=2,mp=4")
    add(
        "--dst_ckpt_strategy",
        type=_path_or_none,
        metavar="PATH",
        help="strategy file or folder of the target (default: merge to one rank)",
    )
    add(
        "--dst_strategy", metavar="GRID", help="the same as a rank grid: dp=2,mp=4,ep=2,pp=2,zero=1"
    )
    add(
        "--prefix",
        metavar="TEXT",
        help="begin of the new files' names, before the rank (default: checkpoint_; our own "
        "checkpoints keep model.safetensors and optimizer.safetensors)",
    )
    add("--src_prefix", metavar="TEXT", help="take only source files whose names begin so")
    add(
        "--format",
        choices=tuple(written_formats()),
        help="of the target (default: the source's)",
    )
    add(
        "--config",
        type=Path,
        metavar="YAML",
        help="the run's configuration: needed where layers do not divide by the stages (offset)",
    )
    add("--workers", type=_count, default=0, metavar="N", help="files at a time (default: by CPUs)")
    add("--overwrite", action="store_true", help="replace a checkpoint at --dst_ckpt_dir")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the source with its manifest, where it has one (default: yes)",
    )
    add("--check_replicas", action="store_true", help="compare replicas in full, not in samples")
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _path_or_none(text: str) -> Path | None:
    return None if text in ("None", "none", "") else Path(text)


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")


def _network(config: Path | None) -> MixtralConfig | None:
    return load_config(config).model.model_config if config else None


@contextmanager
def _progress() -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Yields what starts a bar for so many bytes; threads may advance it together."""
    bars, lock = [], Lock()

    def start(total: int) -> Callable[[int], None]:
        bars.append(progress_bar(total, "writing", "B", scale=True))

        def advance(size: int) -> None:
            with lock:
                bars[0].update(size)

        return advance

    try:
        yield start
    finally:
        for bar in bars:
            bar.close()


def _report(summary: TransformSummary) -> str:
    more = len(summary.files) - 1
    written = f"{summary.folder / summary.files[0]}" + (f" and {more} more" if more else "")
    strategy = f"\nstrategy:  {summary.folder / 'strategy'}" if summary.ranks > 1 else ""
    return (
        f"from:      {summary.source_ranks} rank{'s' * (summary.source_ranks > 1)}\n"
        f"to:        {summary.ranks} rank{'s' * (summary.ranks > 1)}, "
        f"{summary.tensors} tensors, {summary.size / 1e9:,.3f} GB\n"
        f"written:   {written}{strategy}\n"
        f"check:     python -m mixtral_ms inspect {shell_word(summary.folder)}\n"
        f"next:      python run_mindformer.py --config YOUR.yaml "
        f"--load_checkpoint {shell_word(summary.folder)}"
    )


def command() -> int:
    """Entry point of the tool and of `python -m`."""
    return run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
