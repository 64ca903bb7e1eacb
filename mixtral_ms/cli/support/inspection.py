"""What a checkpoint holds and what is wrong with it, gathered for `inspect`."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.regions import region_shape, row_major_blocks, whole_region
from mixtral_ms.checkpoint.formats.strategy_file import read_strategies
from mixtral_ms.checkpoint.formats.tensor_source import (
    DamagedFileError,
    TensorInfo,
    TensorSource,
)
from mixtral_ms.checkpoint.shards.assemble import Strategies, assemble, open_ranks
from mixtral_ms.checkpoint.shards.network_from_shapes import (
    network_of,
    parameter_shapes_of,
    source_strategies,
)
from mixtral_ms.checkpoint.shards.rank_files import find_rank_files
from mixtral_ms.checkpoint.store.manifest import STATE
from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.convert.formats.detect_format import detect_format
from mixtral_ms.convert.formats.examine import weight_problems
from mixtral_ms.convert.formats.found_weights import Flags, FoundWeights, find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.formats.weight_names import OURS
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS, parameter_of
from mixtral_ms.progress import progress_bar

_PIECE_VALUES = 2 << 20
UNKNOWN = "unknown"
# The bits that NaN and infinity have all set, and no other number.
_LARGEST_EXPONENT: dict[str, Any] = {
    "float32": np.uint32(0x7F800000),
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
}


@dataclass
class Inspection:
    """Everything that was found out; `problems` are lines, none for a whole checkpoint."""

    path: Path
    ranks: int = 1
    file_format: str = ""
    names: str = ""
    """Whose names the tensors have: a format of the conversion, or unknown."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """With global shapes where the layout is known, else as rank 0 (or its holder) has them."""
    local: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of a part, where that is not the whole."""
    size: int = 0
    """Bytes of all ranks' values."""
    layout: str = ""
    manifest: str = "none: damage that leaves the files readable cannot be seen"
    state: dict[str, Any] = field(default_factory=dict)
    source: TensorSource | None = None
    problems: list[str] = field(default_factory=list)


def inspect_checkpoint(
    path: Path, *, strategy: Path | None = None, grid: str | None = None, verify: bool = True
) -> Inspection:
    """Open whatever is at `path` and look for everything that is wrong with it.

    Args:
        path: a file, or a folder of ranks, of our checkpoints or of Hugging Face.
        strategy: strategy file or folder of a sharded one; by default the one that lies in it.
        grid: the same as text.
        verify: compare with the manifest, where there is one: reads everything.

    Raises:
        UserError: there is nothing, or nothing that holds tensors.
    """
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path} does not exist")
    found = Inspection(path)
    try:
        weights = find_weights(path, Flags("inspect", "--strategy"), strategy)
    except UserError as error:
        found.problems.append(str(error))
        return found
    found.path = weights.path
    try:
        _read_record(found, weights, verify)
        if weights.by_rank:
            _open_ranks(found, weights.strategy, grid)
        else:
            found.source = open_found(weights)
            _take(found, found.source)
    except UserError as error:
        found.problems.append(str(error))
    _name_format(found)
    if found.source is not None and not weights.by_rank:
        _compare(found, found.source, weights, verify)
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _take(found: Inspection, source: TensorSource) -> None:
    found.tensors = dict(source.infos)
    found.size = found.size or sum(info.nbytes for info in source.infos.values())
    found.file_format = found.file_format or _suffixes([source.path])


def _suffixes(files: Iterable[Path]) -> str:
    return ", ".join(sorted({file.suffix.lstrip(".") for file in files if file.suffix}))


def _read_record(found: Inspection, weights: FoundWeights, verify: bool) -> None:
    """A checkpoint's state, and what the recorded hashes say."""
    if (found.path / STATE).is_file():
        found.state = read_json_object(found.path / STATE)
    problems = weights.hash_problems(read_all=verify)
    if problems is not None:
        found.problems += problems
        found.manifest = _verdict(problems, verify)


def _verdict(problems: list[str], verify: bool) -> str:
    if problems:
        return f"{len(problems)} difference{'s' * (len(problems) > 1)}"
    return "every file and tensor has its hash" if verify else "there, not compared"


def _open_ranks(found: Inspection, strategy: Path | None, grid: str | None) -> None:
    files = find_rank_files(found.path)
    found.ranks, found.file_format = len(files), _suffixes(file for one in files for file in one)
    for file in (file for one in files for file in one):
        try:
            open_tensors(file)
        except UserError as error:
            found.problems.append(str(error))
    ranks = open_ranks(files)
    found.size = sum(info.nbytes for source in ranks for info in source.infos.values())
    found.tensors = {name: info for source in ranks for name, info in source.infos.items()}
    if len(ranks) == 1 and strategy is None and grid is None:
        found.source, found.layout = ranks[0], "whole"
        return
    if grid is not None:
        strategies = source_strategies(found.path, ranks, grid, "--grid")
    elif strategy is not None:
        strategies = read_strategies(strategy)
    else:
        found.layout = "unknown: give --strategy or --grid to have the parts checked"
        return
    found.layout = layout_text(strategies)
    found.source = source = assemble(found.path, ranks, strategies)
    found.tensors = dict(source.infos)
    for name, parts in source.parts.items():
        if (local := region_shape(parts[0].region)) != source.infos[name].shape:
            found.local[name] = local


def layout_text(strategies: Strategies) -> str:
    """The grid that a strategy is of, as far as it shows: `2 stages of 4 ranks, mp=2, ep=2`."""
    stages = {stage for by_stage in strategies.values() for stage in by_stage}
    ranks = max(
        len(placement.ranks) for by_stage in strategies.values() for placement in by_stage.values()
    )
    tensor, expert, zero = 1, 1, False
    for name, by_stage in strategies.items():
        placement = next(iter(by_stage.values()))
        try:
            row = row_of(parameter_of(name))
        except UserError:
            continue
        if row.expert_axis is not None:
            expert = max(expert, placement.cuts[row.expert_axis])
        elif row.tensor_axis is not None:
            tensor = max(tensor, placement.cuts[row.tensor_axis])
        zero = zero or (name.startswith(MOMENTS) and placement.shards > 1)
    text = f"dp={ranks // tensor},mp={tensor},ep={expert},pp={len(stages)}"
    return text + (",zero=1" if zero else "") + f" ({len(stages) * ranks} ranks)"


def _name_format(found: Inspection) -> None:
    """Whose names the tensors have; of our own the network is checked too."""
    if not found.tensors:
        return
    parameters = {n: one for n, one in found.tensors.items() if parameter_of(n) == n}
    try:
        found.names = detect_format(parameters, found.path, None).name
    except UserError:
        found.names = UNKNOWN
    if found.names == OURS.name and found.source is not None:
        try:
            network_of(parameter_shapes_of(found.tensors))
        except UserError as error:
            found.problems.append(str(error))
    found.problems += _moment_problems(found.tensors)


def _compare(found: Inspection, source: TensorSource, weights: FoundWeights, verify: bool) -> None:
    """What a conversion would refuse, and values that no network has."""
    if found.names not in (UNKNOWN, OURS.name):
        found.problems += weight_problems(weights, source)
    if verify and weights.hashes is None:
        found.problems += _value_problems(source)


def _value_problems(source: TensorSource) -> Iterable[str]:
    """Tensors that hold NaN or infinite values, or differ from a checksum of their file's."""
    floats = {name: one for name, one in source.infos.items() if one.dtype in _LARGEST_EXPONENT}
    total = sum(info.nbytes for info in floats.values())
    with progress_bar(total, "looking at values", "B", scale=True) as bar:
        for name, info in floats.items():
            try:
                if not _is_finite(source, name, info):
                    yield f"{name} holds values that are NaN or infinite"
            except DamagedFileError as error:
                yield str(error)
            bar.update(info.nbytes)


def _is_finite(source: TensorSource, name: str, info: TensorInfo) -> bool:
    exponent = _LARGEST_EXPONENT[info.dtype]
    blocks = row_major_blocks(whole_region(info.shape), _PIECE_VALUES)
    values = (np.ascontiguousarray(source.read(name, block)) for block in blocks)
    return not any(((one.view(exponent.dtype) & exponent) == exponent).any() for one in values)


def _moment_problems(tensors: Mapping[str, TensorInfo]) -> Iterable[str]:
    """Moments come in pairs, of parameters that are there."""
    for name in tensors:
        if parameter_of(name) == name:
            continue
        for partner in (prefix + parameter_of(name) for prefix in MOMENTS):
            if partner not in tensors:
                yield f"{name} is there, {partner} is not"


def tensor_sha256(source: TensorSource, name: str) -> str:
    """Hash of a tensor's values in row-major order, whatever the format and the cut."""
    digest = hashlib.sha256()
    for block in row_major_blocks(whole_region(source.infos[name].shape), _PIECE_VALUES):
        digest.update(np.ascontiguousarray(source.read(name, block)).data)
    return digest.hexdigest()
