"""Weights that were found -> the tensors in them."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import format_of
from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.checkpoint.reshard import open_checkpoint
from mixtral_ms.checkpoint.store.conversion_record import require_as_recorded
from mixtral_ms.checkpoint.store.manifest import leaves
from mixtral_ms.convert.formats.foreign_config import CONFIG_JSON
from mixtral_ms.convert.formats.found_weights import (
    FoundWeights,
    Kind,
    index_names,
    name_patterns,
)
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object, require_shape
from mixtral_ms.progress import progress_bar

_RELEASE_MD5 = {
    "consolidated.00.pth": "1faa9bc9b20fcfe81fcd4eb7166a79e6",
    "tokenizer.model": "37974873eb68a7ab30c4912fc36264ae",
}
_CHUNK = 1 << 22
_SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})")
# Tensors of GPTQ and AWQ, of bitsandbytes, of FP8 and compressed-tensors.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|quant_state\..+"
    r"|weight_scale|weight_scale_inv|weight_packed|input_scale)$"
)


def open_found(found: FoundWeights) -> TensorSource:
    """The tensors of what `find_weights` has found, global, under the names that they have there.

    What we wrote ourselves is compared with its recorded hashes first.

    Raises:
        UserError: there are none, they are damaged or quantised, a file is missing, or of several
            ranks nothing says how they are cut.
        DamagedFileError: a file is not what its format says.
    """
    if found.by_rank or found.strategy is not None:
        return _open_by_rank(found)
    if found.kind is Kind.FILE:
        require_as_recorded(found.path)
        source = open_tensors(found.path)
    elif found.index is not None:
        source = _open_indexed(found, found.index)
    else:
        files = _files(found)
        require_as_recorded(found.path)
        source = MergedSource(found.path, [open_tensors(file) for file in files])
    _require_plain(found, source)
    return source


def _require_plain(found: FoundWeights, source: TensorSource) -> None:
    """Refuse quantised weights, by the tensors that only they have."""
    shown = next((name for name in source.infos if _QUANTISED.search(name)), None)
    if shown is None:
        return
    folder = found.path if found.path.is_dir() else found.path.parent
    config = folder / CONFIG_JSON
    section = read_json_object(config).get("quantization_config") if config.is_file() else None
    method = section.get("quant_method") if isinstance(section, dict) else None
    by = f"quant_method {method} by {CONFIG_JSON}" if method else f"they hold {shown}"
    raise UserError(
        f"{found.flags.start}{found.path}: these weights are quantised ({by}): give the 16 bit "
        "release (fp16 or bf16), or dequantise them first"
    )


def _open_by_rank(found: FoundWeights) -> TensorSource:
    ranks = len(list(found.path.glob("rank_*")))
    if ranks > 1 and found.strategy is None:
        flags = found.flags
        raise UserError(f"{flags.start}{found.path} holds {ranks} ranks: give {flags.strategy} too")
    opened = open_checkpoint.open_source(found.path, strategy=found.strategy)
    return MergedSource(found.path, [opened.tensors])


def _files(found: FoundWeights) -> Sequence[Path]:
    start, files = f"{found.flags.start}{found.path}", found.files
    if not files:
        raise UserError(
            f"{start} holds no weights: looked for rank_0, {', '.join(index_names())} and "
            f"{', '.join(name_patterns())}{_cache_hint(found.path)}"
        )
    known = format_of(files[0])
    if len(files) > 1 and known is not None and known.index is None:
        names = ", ".join(one.name for one in files)
        raise UserError(f"{start} holds several checkpoints: name one of {names}")
    _require_all_shards(start, files)
    return files


def _cache_hint(folder: Path) -> str:
    """Where the weights are in the cache of Hugging Face's hub, of which a root was named."""
    root = folder.parent if folder.name == "snapshots" else folder
    snapshots = sorted(one for one in root.glob("snapshots/*") if one.is_dir())
    if not snapshots:
        return ""
    main = root / "refs" / "main"
    named = root / "snapshots" / main.read_text().strip() if main.is_file() else snapshots[-1]
    return f". It is a cache of Hugging Face's: give {named if named.is_dir() else snapshots[-1]}"


def _require_all_shards(start: str, files: Sequence[Path]) -> None:
    """Where names say of how many files each is one, all must be there."""
    numbers = [match for file in files if (match := _SHARD.search(file.name))]
    counts = {int(match["count"]) for match in numbers}
    if len(counts) > 1:
        said = " and ".join(str(one) for one in sorted(counts))
        raise UserError(f"{start} holds shards of sets of {said} files: remove one of the sets")
    there = {int(match["number"]) for match in numbers}
    if counts and (missing := sorted(set(range(1, max(counts) + 1)) - there)):
        first = _SHARD.sub(f"-{missing[0]:05d}-of-{max(counts):05d}", numbers[0].string, count=1)
        raise UserError(_lacks(start, first, len(missing) - 1, "the others' names count"))


def _lacks(where: object, first: str, more: int, why: str) -> str:
    others = f" and {more} more files" if more > 0 else ""
    return f"{where} lacks {first}{others}, which {why}: finish the download"


def _open_indexed(found: FoundWeights, index: Path) -> TensorSource:
    """The files that a Hugging Face index names, each tensor from the one that it says."""
    owners = read_json_object(index)
    require_shape(owners, {"weight_map": {str: str}}, f"{index} is not an index of tensors")
    owners = owners["weight_map"]
    names = sorted(set(owners.values()))
    if outside := next(filter(leaves, names), None):
        raise UserError(f"{index}: {outside!r} lies outside of its folder, and is not read")
    missing = [name for name in names if not _is_there(index.parent / name)]
    if missing:
        raise UserError(_lacks(index.parent, missing[0], len(missing) - 1, f"{index.name} names"))
    require_as_recorded(found.path)
    opened = {name: open_tensors(index.parent / name) for name in names}
    return MergedSource(
        found.path,
        list(opened.values()),
        {tensor: opened[name] for tensor, name in owners.items()},
    )


def _is_there(path: Path) -> bool:
    """Whether something has the name, be it a link to nothing: who opens it says so."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


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
