"""What a conversion will do: which region of the source becomes which part of which file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo, TensorSource
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.adapters.lora_weights import AdaptedWeights, Adapter
from mixtral_ms.convert.formats.atom_audit import problems_text, require_same_atoms, source_problems
from mixtral_ms.convert.formats.tensor_layouts import Atom, Slot, TensorLayout, layout_of
from mixtral_ms.convert.formats.weight_names import Format
from mixtral_ms.errors import UserError


@dataclass(frozen=True)
class Target:
    """A tensor to be written."""

    layout: TensorLayout
    info: TensorInfo


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    name: str
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(target.info.nbytes for target in self.targets)


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion, tensor by tensor."""

    source: TensorSource
    source_format: Format
    target_format: Format
    source_layouts: tuple[TensorLayout, ...]
    origins: Mapping[Atom, tuple[str, Slot]]
    """Source tensor and slot in it of every atom."""
    shards: tuple[Shard, ...]
    head_dim: int
    left_out: tuple[str, ...]
    """Source tensors that are no weights."""

    @property
    def merged(self) -> Adapter | None:
        """The LoRA adapter that is added to the source's weights."""
        return self.source.adapter if isinstance(self.source, AdaptedWeights) else None

    @property
    def targets(self) -> list[Target]:
        """Every tensor to be written."""
        return [target for shard in self.shards for target in shard.targets]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(shard.nbytes for shard in self.shards)

    def fingerprint(self) -> str:
        """Hash of the source's identity and of what is to be written: decides over a resume."""
        described = [
            _identity(self.source.path),
            *([_identity(self.merged.path)] if self.merged else []),
            [self.source_format.name, self.target_format.name, self.head_dim],
            [
                [shard.name, [[t.layout.name, t.info.shape, t.info.dtype] for t in shard.targets]]
                for shard in self.shards
            ],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _identity(path: Path) -> list[list[object]]:
    """Every file of a source with its size and the time it was changed."""
    if path.is_dir():  # without hidden files: what is being converted may be written here
        found = [one for pattern in ("[!.]*", "rank_*/*") for one in path.glob(pattern)]
        files = sorted(one for one in found if one.is_file())
    else:
        files = [path]
    stats = [(file, file.stat()) for file in files]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def plan_conversion(
    source: TensorSource,
    source_format: Format,
    target_format: Format,
    config: MixtralConfig,
    *,
    dtype: str | None,
    file_pattern: str,
    max_shard_bytes: int | None,
) -> ConversionPlan:
    """ConversionPlan a conversion, and check that it is one of everything.

    Args:
        source: the tensors.
        source_format: what they are.
        target_format: what they become.
        config: sizes of the network, and head_dim where the rotary order changes.
        dtype: of the output; None keeps the source's.
        file_pattern: name of the files, with {shard}, which is "" or "-00001-of-00003".
        max_shard_bytes: most bytes of a file, save for one larger tensor; None for one file.

    Raises:
        UserError: the source is not whole, or tensors of several dtypes would become one.
    """
    try:
        source_layouts = layout_of(source_format, config)
        target_layouts = layout_of(target_format, config)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    problems, left_out = source_problems(source.infos, source_layouts)
    if problems:
        raise UserError(problems_text(f"{source.path} is not as it should be", problems))
    require_same_atoms(source_layouts, target_layouts)
    origins = {slot.atom: (layout.name, slot) for layout in source_layouts for slot in layout.slots}
    targets = [
        Target(one, TensorInfo(one.shape, dtype or _common_dtype(one, origins, source)))
        for one in target_layouts
    ]
    return ConversionPlan(
        source,
        source_format,
        target_format,
        tuple(source_layouts),
        origins,
        _shards(targets, file_pattern, max_shard_bytes),
        config.head_dim,
        tuple(left_out),
    )


def _common_dtype(
    layout: TensorLayout, origins: Mapping[Atom, tuple[str, Slot]], source: TensorSource
) -> str:
    names = [origins[slot.atom][0] for slot in layout.slots]
    dtypes = {source.infos[name].dtype: name for name in names}
    if len(dtypes) > 1:
        several = " and ".join(f"{name} ({dtype})" for dtype, name in dtypes.items())
        raise UserError(
            f"{source.path}: {several} would become one tensor, {layout.name}: say with --dtype "
            "which it is to have"
        )
    return next(iter(dtypes))


def _shards(targets: Sequence[Target], pattern: str, max_bytes: int | None) -> tuple[Shard, ...]:
    groups: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if max_bytes is not None and groups[-1] and size + target.info.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.info.nbytes
    count = len(groups)
    parts = [f"-{at:05d}-of-{count:05d}" if count > 1 else "" for at in range(1, count + 1)]
    return tuple(
        Shard(pattern.format(shard=part), tuple(group))
        for part, group in zip(parts, groups, strict=True)
    )


def mapping_table(plan: ConversionPlan) -> str:
    """Every tensor to be written and where its values come from, as text."""
    lines = []
    for shard in plan.shards:
        lines.append(f"{shard.name}: {len(shard.targets)} tensors, {shard.nbytes:,} bytes")
        for target in shard.targets:
            first, last = target.layout.slots[0], target.layout.slots[-1]
            name, origin = plan.origins[first.atom]
            until = plan.origins[last.atom][0]
            how = "" if origin.op == first.op else f", {_how(origin.op, first.op)}"
            came = name if until == name else f"{name} ... {until}"
            dtype = plan.source.infos[name].dtype
            cast = (
                target.info.dtype
                if dtype == target.info.dtype
                else f"{dtype} -> {target.info.dtype}"
            )
            lines.append(f"  {target.layout.name} {target.info.shape} {cast} <- {came}{how}")
    lines += [f"left out: {name}" for name in plan.left_out]
    return "\n".join(lines)


def _how(source: str, target: str) -> str:
    if "transposed" in (source, target):
        return "transposed"
    return "rotary pairs to halves" if source == "interleaved" else "rotary halves to pairs"
