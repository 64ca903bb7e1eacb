"""Weights of any format under our names, read piece by piece: what `load_checkpoint` takes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.regions import overlap, region_shape, relative, whole_region
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorInfo, TensorSource, carrier
from mixtral_ms.config.derived.numerics import warn_of_other_numerics
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.adapters.lora_weights import ADAPTER_KEY, adapted
from mixtral_ms.convert.formats.atom_audit import problems_text, source_problems
from mixtral_ms.convert.formats.detect_format import detect_format
from mixtral_ms.convert.formats.found_weights import FoundWeights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.formats.tensor_layouts import Atom, Slot, TensorLayout, layout_of
from mixtral_ms.convert.formats.transpose_stream import stored_pieces
from mixtral_ms.convert.formats.weight_names import OURS
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

_PIECE_VALUES = 4 << 20


def open_weights(
    found: FoundWeights,
    config: MixtralConfig,
    *,
    allow_partial: bool = False,
    adapter: Path | None = None,
) -> TensorSource:
    """The weights of a network, from any format and under our names.

    Args:
        found: what `find_weights` answered.
        config: the network they are for.
        allow_partial: leave out what is missing, surplus or misshapen, and log its names.
        adapter: a LoRA adapter to add to them.

    Raises:
        UserError: there are none, they are damaged, or do not fit the network; tensors are named.
        DamagedFileError: a file is not what its format says.
    """
    if found.is_adapter:
        flag, path = found.flags.weights, found.named
        raise UserError(
            f"{flag}: {path} holds an adapter: give {flag} the weights that it is for, and name "
            f"it by --set {ADAPTER_KEY}={path}"
        )
    path = found.path
    source = open_found(found)
    if said := found.network:
        warn_of_other_numerics(said.path, said.config, config, said.names)
    format_ = detect_format(source.infos, path, found.format_name)
    layouts = layout_of(format_, config)
    problems, left_out = source_problems(source.infos, layouts)
    if problems and not allow_partial:
        raise UserError(
            problems_text(f"{found.flags.start}{path} does not fit model.model_config", problems)
            + "\nTo load only what fits: --allow_partial"
        )
    for name, problem in problems.items():
        get_logger().warning("%s %s: skipped", name, problem)
    if left_out:
        get_logger().info("%s: %d tensors that are no weights are not read", path, len(left_out))
    usable = [layout for layout in layouts if layout.name not in problems]
    weights = WeightView(source, usable, layout_of(OURS, config), config.head_dim)
    return weights if adapter is None else adapted(weights, adapter, config)


class WeightView(TensorSource):
    """A source of any format, seen as ours.

    Args:
        source: the tensors.
        layouts: those of them that can be used, in their format.
        ours: every parameter of the network; one of which any part is not there is left out.
        head_dim: rows of a head, for the rotary order.
    """

    def __init__(
        self,
        source: TensorSource,
        layouts: Sequence[TensorLayout],
        ours: Sequence[TensorLayout],
        head_dim: int,
    ) -> None:
        self.path, self._source, self._head_dim = source.path, source, head_dim
        self._origins: dict[Atom, tuple[str, Slot]] = {
            slot.atom: (layout.name, slot) for layout in layouts for slot in layout.slots
        }
        self._layouts = {
            one.name: one for one in ours if all(slot.atom in self._origins for slot in one.slots)
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(layout.shape, self._dtype(layout))
            for name, layout in self._layouts.items()
        }

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """See TensorSource; a tensor that is stored as ours is read as a view."""
        layout = self._layouts[name]
        wanted = whole_region(layout.shape) if region is None else region
        if (stored := self._stored_alike(layout)) is not None:
            return self._source.read(stored, wanted)
        array = np.empty(region_shape(wanted), carrier(self.infos[name].dtype))
        for slot in layout.slots:
            if shared := overlap(slot.region, wanted):
                inside = array[relative(shared, wanted)]
                inside[...] = self._read_slot(slot, shared).reshape(inside.shape)
        return array

    def _stored_alike(self, layout: TensorLayout) -> str | None:
        """The source's tensor that holds all of ours in the same place, if one does."""
        origins = [self._origins[slot.atom] for slot in layout.slots]
        alike = all(
            (origin.region, origin.op) == (slot.region, slot.op)
            for slot, (_, origin) in zip(layout.slots, origins, strict=True)
        )
        names = {name for name, _ in origins}
        return names.pop() if alike and len(names) == 1 else None

    def _read_slot(self, slot: Slot, region: Region) -> np.ndarray:
        """The part of one matrix, or vector, that lies in `region` of our tensor."""
        name, origin = self._origins[slot.atom]
        axes = len(slot.shape)  # without that of the experts
        within = relative(region, slot.region)[-axes:]
        if origin.op == slot.op:
            moved = (
                slice(base.start + cut.start, base.start + cut.stop)
                for base, cut in zip(origin.region[-axes:], within, strict=True)
            )
            return self._source.read(name, (*origin.region[:-axes], *moved))
        pieces = stored_pieces(
            partial(self._source.read, name),
            origin,
            slot.op,
            head_dim=self._head_dim,
            most=_PIECE_VALUES,
        )
        return np.concatenate(list(pieces)).reshape(slot.shape)[within]

    def _dtype(self, layout: TensorLayout) -> str:
        dtypes = {self._source.infos[self._origins[slot.atom][0]].dtype for slot in layout.slots}
        if len(dtypes) > 1:
            raise UserError(
                f"{self.path}: the parts of {layout.name} are {' and '.join(sorted(dtypes))}: "
                "convert them to one dtype first (convert_weight.py --dtype)"
            )
        return dtypes.pop()
