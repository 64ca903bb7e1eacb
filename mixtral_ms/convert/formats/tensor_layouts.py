"""Where each matrix of the network lies in the tensors of a format.

An atom is one of our parameters, or one expert's matrix of it. A tensor of any format is, in
row-major order, a sequence of atoms; that is all a conversion needs to know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixtral_ms.checkpoint.formats.regions import whole_region
from mixtral_ms.checkpoint.formats.tensor_source import Region
from mixtral_ms.config.derived.parameter_row import Operation, Stored
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.formats.weight_names import Entry, Format
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes

Atom = tuple[str, int | None]
"""Our parameter's name, and the expert where the parameter holds several."""


@dataclass(frozen=True)
class Slot:
    """An atom in a tensor: the region that holds it, and how it is stored there."""

    atom: Atom
    region: Region
    shape: tuple[int, ...]
    """Of the atom as stored: of the region, without the axis of experts."""
    op: Operation


@dataclass(frozen=True)
class TensorLayout:
    """A tensor of a format: its slots, in row-major order, fill it."""

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]


def layout_of(format_: Format, config: MixtralConfig) -> list[TensorLayout]:
    """Every tensor of the weights of a network in a format, layer after layer.

    Raises:
        UserError: the network has parameters that the format has no name for.
    """
    layouts = [
        layout
        for entry, layer in _entries_in_order(format_, config.num_layers)
        for layout in _tensors(entry, layer, config)
    ]
    held = {slot.atom[0] for layout in layouts for slot in layout.slots}
    if homeless := [name for name in parameter_shapes(config) if name not in held]:
        raise UserError(
            f"the format {format_.name} ({format_.text}) has no place for {homeless[0]}"
            + (f" and {len(homeless) - 1} more" if len(homeless) > 1 else "")
        )
    return layouts


def _entries_in_order(format_: Format, num_layers: int) -> Iterator[tuple[Entry, int]]:
    """Entries as the network meets them: embedding, layers, final norm and head."""
    stages: dict[str, list[Entry]] = {"first_stage": [], "layer": [], "last_stage": []}
    for entry in format_.entries:
        stages[entry.rows[0].stage].append(entry)
    yield from ((entry, 0) for entry in stages["first_stage"])
    yield from ((entry, layer) for layer in range(num_layers) for entry in stages["layer"])
    yield from ((entry, 0) for entry in stages["last_stage"])


def _tensors(entry: Entry, layer: int, config: MixtralConfig) -> Iterator[TensorLayout]:
    row, stored = entry.rows[0], entry.stored
    if not row.present(config):
        return
    names, shape = [one.at(layer) for one in entry.rows], row.shape(config)
    if row.expert_axis is None:
        slot = Slot((names[0], None), whole_region(shape), shape, stored.operation)
        yield TensorLayout(stored.name.format(layer=layer), shape, (slot,))
    elif "{expert}" in stored.name:
        for expert in range(shape[0]):
            name = stored.name.format(layer=layer, expert=expert)
            yield _matrix_of_experts(name, stored, names, shape[1:], [expert])
    elif stored.flat:
        name, experts = stored.name.format(layer=layer), range(shape[0])
        yield _matrix_of_experts(name, stored, names, shape[1:], experts)
    else:
        yield _stack_of_experts(stored.name.format(layer=layer), stored, names, shape)


def _turned(shape: tuple[int, ...], op: Operation) -> tuple[int, ...]:
    return shape[::-1] if op == "transposed" else shape


def _matrix_of_experts(
    name: str, stored: Stored, names: list[str], shape: tuple[int, ...], experts: Sequence[int]
) -> TensorLayout:
    """(experts * rows, columns)."""
    rows, columns = turned = _turned(shape, stored.operation)
    atoms = [(parameter, expert) for expert in experts for parameter in names]
    slots = tuple(
        Slot(atom, (slice(at * rows, (at + 1) * rows), slice(0, columns)), turned, stored.operation)
        for at, atom in enumerate(atoms)
    )
    return TensorLayout(name, (len(atoms) * rows, columns), slots)


def _stack_of_experts(
    name: str, stored: Stored, names: list[str], shape: tuple[int, ...]
) -> TensorLayout:
    """(experts, parts * rows, columns)."""
    experts = shape[0]
    rows, columns = turned = _turned(shape[1:], stored.operation)
    slots = tuple(
        Slot(
            (parameter, expert),
            (
                slice(expert, expert + 1),
                slice(part * rows, (part + 1) * rows),
                slice(0, columns),
            ),
            turned,
            stored.operation,
        )
        for expert in range(experts)
        for part, parameter in enumerate(names)
    )
    return TensorLayout(name, (experts, len(names) * rows, columns), slots)
