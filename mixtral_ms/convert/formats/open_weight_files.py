"""Weights that were found -> the tensors in them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import format_of
from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.reshard import open_checkpoint
from mixtral_ms.checkpoint.store.conversion_record import require_as_recorded
from mixtral_ms.convert.formats.found_weights import (
    FoundWeights,
    Kind,
    index_names,
    name_patterns,
)
from mixtral_ms.errors import UserError
from mixtral_ms.progress import progress_bar

_RELEASE_MD5 = {
    "consolidated.00.pth": "1faa9bc9b20fcfe81fcd4eb7166a79e6",
    "tokenizer.model": "37974873eb68a7ab30c4912fc36264ae",
}
_CHUNK = 1 << 22


def open_found(found: FoundWeights) -> TensorSource:
    """The tensors of what `find_weights` has found, global, under the names that they have there.

    Raises:
        UserError: there are none, they are damaged, a file is missing, or of several ranks nothing
            says how they are cut.
        DamagedFileError: a file is not what its format says.
    """
    if found.by_rank or found.strategy is not None:
        return _open_by_rank(found)
    files = [found.path] if found.kind is Kind.FILE else _files(found)
    require_as_recorded(found.path)
    if found.kind is Kind.FILE:
        return open_tensors(found.path)
    return MergedSource(found.path, [open_tensors(file) for file in files])


def _open_by_rank(found: FoundWeights) -> TensorSource:
    ranks = len(list(found.path.glob("rank_*")))
    if ranks > 1 and found.strategy is None:
        flags = found.flags
        raise UserError(f"{flags.start}{found.path} holds {ranks} ranks: give {flags.strategy} too")
    opened = open_checkpoint.open_source(found.path, strategy=found.strategy)
    return MergedSource(found.path, [opened.tensors])


def _files(found: FoundWeights) -> Sequence[Path]:
    start, files = f"{found.flags.start}{found.path}", found.files
    if found.index is not None:
        return _indexed(found.index)
    if not files:
        raise UserError(
            f"{start} holds no weights: looked for rank_0, {', '.join(index_names())} and "
            f"{', '.join(name_patterns())}"
        )
    known = format_of(files[0])
    if len(files) > 1 and known is not None and known.index is None:
        names = ", ".join(one.name for one in files)
        raise UserError(f"{start} holds several checkpoints: name one of {names}")
    return files


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
