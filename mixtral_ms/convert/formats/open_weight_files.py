"""What a user names as input -> the tensors in it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import FILE_FORMATS, format_of
from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.reshard import open_checkpoint
from mixtral_ms.checkpoint.reshard.open_checkpoint import (
    STRATEGY_FOLDER,
    checkpoint_folder,
    open_sharded,
)
from mixtral_ms.checkpoint.shards.rank_files import is_rank_folders
from mixtral_ms.errors import UserError
from mixtral_ms.progress import progress_bar

_KNOWN_NAMES = (
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "consolidated*.pth",
    "consolidated*.pt",
    "consolidated*.safetensors",
)
_SPLIT = "*.pth-split0"
_RELEASE_MD5 = {
    "consolidated.00.pth": "1faa9bc9b20fcfe81fcd4eb7166a79e6",
    "tokenizer.model": "37974873eb68a7ab30c4912fc36264ae",
}
_CHUNK = 1 << 22


def open_source(
    path: Path,
    flag: str,
    strategy: Path | None = None,
    strategy_flag: str = "--strategy_dir",
) -> TensorSource:
    """The weights in a file or a folder.

    In a folder: a checkpoint of ours, the latest of several, or ranks of MindSpore's; files named
    by a Hugging Face index; else the first that is there of model*.safetensors,
    pytorch_model*.bin, consolidated* (also in parts), any files of a format that is written, or the
    one file where that format knows no index.

    Args:
        path: what the user named.
        flag: with this.
        strategy: strategy file or folder of a checkpoint in rank_0, rank_1, ...; None where it is
            of one rank, or `strategy/` lies in it.
        strategy_flag: with which the user names it.

    Returns:
        Global tensors; its `path` is the checkpoint's folder where `path` holds several.

    Raises:
        UserError: there are none, or they are damaged, or a file is missing.
        DamagedFileError: a file is not what its format says.
    """
    if not path.exists():
        raise UserError(f"{flag}: {path} does not exist")
    if strategy is not None:
        if not strategy.exists():
            raise UserError(f"{strategy_flag}: {strategy} does not exist")
        return open_sharded(checkpoint_folder(path), strategy)
    if path.is_file():
        return open_tensors(path)
    folder = checkpoint_folder(path)
    if is_rank_folders(folder):
        ranks = len(list(folder.glob("rank_*")))
        if ranks > 1 and not (folder / STRATEGY_FOLDER).is_dir():
            raise UserError(f"{flag}: {folder} holds {ranks} ranks: give {strategy_flag} too")
        opened = open_checkpoint.open_source(folder).tensors
        return MergedSource(folder, [opened])
    return MergedSource(path, [open_tensors(file) for file in _files(path, flag)])


def _files(folder: Path, flag: str) -> Sequence[Path]:
    indexes = [one.index for one in FILE_FORMATS.values() if one.index]
    for name in indexes:
        if (folder / name).is_file():
            return _indexed(folder / name)
    if parts := sorted(folder.glob(_SPLIT)):
        return parts
    written = [one for one in FILE_FORMATS.values() if one.write]
    patterns = (*_KNOWN_NAMES, *(f"*{suffix}" for one in written for suffix in one.suffixes))
    for pattern in patterns:
        found = sorted(one for one in folder.glob(pattern) if not one.name.startswith("."))
        if len(found) > 1 and format_of(found[0]).index is None:
            names = ", ".join(one.name for one in found)
            raise UserError(f"{flag}: {folder} holds several checkpoints: name one of {names}")
        if found:
            return found
    raise UserError(
        f"{flag}: {folder} holds no weights: looked for rank_0, "
        f"{', '.join(indexes)} and {', '.join(patterns)}"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that a Hugging Face index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not an index of tensors: {error!r}") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + f", which {index.name} names: finish the download"
        )
    return [index.parent / name for name in names]


def verify_release(folder: Path) -> list[str]:
    """Compare Mistral's release of Mixtral 8x7B with its published MD5 sums.

    A file in parts (name-split0, ...) is hashed as one.

    Returns:
        One line a file.

    Raises:
        UserError: a file is missing or has another sum.
    """
    lines = []
    for name, published in _RELEASE_MD5.items():
        parts = [folder / name] if (folder / name).is_file() else _parts(folder, name)
        if not parts:
            raise UserError(f"--verify_md5: {folder} holds neither {name} nor {name}-split0")
        if (found := _md5(parts, name)) != published:
            raise UserError(
                f"--verify_md5: {folder / name} has MD5 {found}, published is {published}: "
                "download it again"
            )
        lines.append(f"{name}: MD5 {found}, as published")
    return lines


def _parts(folder: Path, name: str) -> list[Path]:
    parts = folder.glob(f"{name}-split*")
    return sorted(parts, key=lambda part: int(part.name.rpartition("split")[2]))


def _md5(files: Sequence[Path], name: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    total = sum(file.stat().st_size for file in files)
    with progress_bar(total, f"MD5 of {name}", "B", scale=True) as bar:
        for file in files:
            with open(file, "rb") as data:
                while chunk := data.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()
