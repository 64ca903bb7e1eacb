"""The files of each rank in a sharded checkpoint: `rank_0/`, `rank_1/`, … with one checkpoint each.

Folders of MindSpore and MindFormers may hold several checkpoints, of which the newest is taken:
`{prefix}-{epoch}_{step}.ckpt` or `.safetensors`. Ours hold one, in the files of STEMS.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import written_suffixes
from mixtral_ms.errors import UserError

MODEL_STEM, ADAPTER_STEM, OPTIMIZER_STEM = "model", "adapter", "optimizer"
STEMS = (MODEL_STEM, ADAPTER_STEM, OPTIMIZER_STEM)
"""Names without suffix of the files of one rank in our own checkpoints."""
_RANK = re.compile(r"rank_(\d+)")
_AT_STEP = re.compile(r"(?P<series>.+)-(?P<epoch>\d+)_(?P<step>\d+)")
_NAMES_SHOWN = 3


def is_rank_folders(folder: Path) -> bool:
    """Whether a folder holds folders of ranks."""
    return folder.is_dir() and any(_rank_of(path) is not None for path in folder.iterdir())


def tensor_files(folder: Path) -> list[Path]:
    """Files in a folder that are of a format that is written."""
    suffixes = written_suffixes()
    return sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())


def find_rank_files(folder: Path, prefix: str | None = None) -> list[list[Path]]:
    """For each rank, in order, the files of its part of the checkpoint.

    Args:
        folder: holds `rank_0` to `rank_n-1`.
        prefix: take only files whose names begin so.

    Raises:
        UserError: a rank is missing or has no file; a rank's files are of several checkpoints and
            their names do not say which is the newest; the ranks' files are of different steps.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")
    found = {rank: path for path in folder.iterdir() if (rank := _rank_of(path)) is not None}
    if not found:
        raise UserError(f"{folder} holds no folder rank_0, rank_1, …")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise UserError(
            f"{folder} has no folder {_listed(f'rank_{rank}' for rank in missing)}, but one up to "
            f"rank_{max(found)}: copy what is missing from the other machines"
        )
    files = [_choose(found[rank], prefix) for rank in range(len(found))]
    _require_one_step(files)
    return files


def is_rank_name(name: str) -> bool:
    """Whether a folder's name is that of a rank."""
    return _RANK.fullmatch(name) is not None


def _rank_of(path: Path) -> int | None:
    match = _RANK.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def _choose(folder: Path, prefix: str | None) -> list[Path]:
    """The files of one rank's checkpoint."""
    files = tensor_files(folder)
    wanted = [path for path in files if path.name.startswith(prefix or "")]
    if not wanted:
        has = f"; it holds {_listed(path.name for path in files)}" if files else ""
        named = f" whose name begins with {prefix!r}" if prefix else ""
        suffixes = " or ".join(written_suffixes())
        raise UserError(f"{folder} holds no {suffixes} file{named}{has}")
    if len(wanted) == 1 or all(path.stem in STEMS for path in wanted):
        return _of_one_format(folder, wanted)
    at_step = {path: match for path in wanted if (match := _AT_STEP.fullmatch(path.stem))}
    if unnamed := [path.name for path in wanted if path not in at_step]:
        raise UserError(
            f"{folder} holds {len(wanted)} checkpoints, and {unnamed[0]} does not say its step as "
            "NAME-EPOCH_STEP does: name the one to take with --src_prefix"
        )
    series = sorted({match["series"] for match in at_step.values()})
    if len(series) > 1:
        raise UserError(
            f"{folder} holds checkpoints of several runs: {_listed(series)}; "
            "name the one to take with --src_prefix"
        )
    newest = max(map(_step_in, at_step.values()))
    return _of_one_format(
        folder, [path for path, match in at_step.items() if _step_in(match) == newest]
    )


def _of_one_format(folder: Path, files: list[Path]) -> list[Path]:
    if len({path.suffix for path in files}) > 1:
        raise UserError(
            f"{folder} holds the checkpoint in two formats, "
            f"{_listed(path.name for path in files)}: move one of them away"
        )
    return files


def step_of(path: Path) -> tuple[int, int] | None:
    """(epoch, step in it) in a file's name; None where the name has none."""
    match = _AT_STEP.fullmatch(path.stem)
    return _step_in(match) if match else None


def _step_in(match: re.Match[str]) -> tuple[int, int]:
    return int(match["epoch"]), int(match["step"])


def _require_one_step(files: list[list[Path]]) -> None:
    """All ranks have files of the same names but for the rank, and of the same step."""
    first = files[0]
    for rank, own in enumerate(files):
        if [step_of(path) for path in own] != [step_of(path) for path in first]:
            raise UserError(
                f"rank {rank}'s file {own[0].name} is of another step than rank 0's "
                f"{first[0].name}: a checkpoint was not saved on every rank; move the newer "
                "files away"
            )
        if [_kind(path) for path in own] != [_kind(path) for path in first]:
            raise UserError(
                f"rank {rank} has {_listed(path.name for path in own)}, "
                f"rank 0 has {_listed(path.name for path in first)}"
            )


def _kind(path: Path) -> str:
    """What distinguishes the files of one rank."""
    return path.stem + path.suffix if path.stem in STEMS else path.suffix


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
