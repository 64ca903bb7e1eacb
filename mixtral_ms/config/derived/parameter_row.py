"""What there is to say of a parameter: the columns of `parameter_table.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mixtral_ms.config.sections.model_section import MixtralConfig

LORA_A, LORA_B = ".lora_a", ".lora_b"
"""What stands behind a module's name in the names of its adapter."""
OUR_FORMAT = "ours"
"""Name of the format that has our names and our layout."""

Stage = Literal["first_stage", "layer", "last_stage"]
GradientParts = Literal["never", "of sequence", "always"]
Operation = Literal["same", "transposed", "interleaved"]
"""How a matrix is stored, relative to ours: `interleaved` has the rows of each head in the order
of rotary pairs (0, d/2, 1, d/2+1, ...) where ours has halves (0, 1, ..., d-1)."""


@dataclass(frozen=True)
class Axis:
    """An axis of parameters, by what it counts."""

    name: str
    size: Callable[[MixtralConfig], int]
    cut: Literal["tensor", "expert"] | None = None
    """Over which ranks it is cut: tensor-parallel ones (parallel_config.model_parallel; of experts
    what expert_parallel leaves of it) or expert-parallel ones; None keeps it whole."""


@dataclass(frozen=True)
class Stored:
    """The tensor that holds a parameter in another format.

    Parameters that name the same tensor share it: they alternate within each expert along the
    rows, in the table's order.
    """

    name: str
    """With {layer} and, where every expert has a tensor of its own, {expert}."""
    operation: Operation = "same"
    flat: bool = False
    """Experts follow one another along axis 0 of a matrix, instead of on an axis of their own."""


@dataclass(frozen=True)
class Lora:
    """That a matrix may have a low-rank adapter."""

    peft: Literal["module", "parameter"]
    """What adapts it in the library peft: transformers 5 has attention as modules, router and
    experts as parameters."""
    word: str = ""
    """It is adapted only by a pattern of target_modules that has this word."""


def always(_: MixtralConfig) -> bool:
    """Of what every network has."""
    return True


@dataclass(frozen=True, eq=False)
class ParameterRow:
    """A parameter, or those of all layers that differ by the layer's number alone."""

    name: str
    """With {layer}."""
    axes: tuple[Axis, ...]
    stage: Stage = "layer"
    """The pipeline stage that holds it."""
    present: Callable[[MixtralConfig], bool] = always
    """Which networks have it."""
    initial: Literal["normal", "ones", "zeros", "uniform"] = "normal"
    """What training from scratch begins with: `normal` has deviation init_method_std, `uniform` is
    peft's for A of an adapter."""
    always_float32: bool = False
    """Whether it is float32 in inference whatever weight_dtype says."""
    gradient_in_parts: GradientParts = "never"
    """Whether tensor-parallel ranks that all hold it have a part of its gradient each: where
    use_seq_parallel gives each a part of the sequence, or anyway."""
    lora: Lora | None = None
    decoder: str = ""
    """Its field in infer/runners/cpp/decoder.hpp, `.bias` behind that of the matrix it is added to;
    empty where that decoder does not know it."""
    elsewhere: Mapping[str, Stored] = field(default_factory=dict)
    """By format, what holds it there. Where a format is as another one, that one's entry is
    enough: see `Format.like`."""

    @property
    def is_cast(self) -> bool:
        """Whether training casts it to the compute dtype: then it may have working weights."""
        return not self.always_float32

    def shape(self, config: MixtralConfig) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(axis.size(config) for axis in self.axes)

    def at(self, layer: int = 0) -> str:
        """The name in a layer; outside layers the name."""
        return self.name.format(layer=layer)

    @property
    def module(self) -> str:
        """Name, with {layer}, of the module whose weight it is: what LoRA's patterns match."""
        return self.name.removesuffix(".weight")

    @property
    def tensor_axis(self) -> int | None:
        """Number of the axis that is cut over tensor-parallel ranks."""
        return self._cut_axis("tensor")

    @property
    def expert_axis(self) -> int | None:
        """Number of the axis that is cut over expert-parallel ranks."""
        return self._cut_axis("expert")

    def _cut_axis(self, cut: str) -> int | None:
        return next((at for at, axis in enumerate(self.axes) if axis.cut == cut), None)

    def stored(self, *formats: str) -> Stored | None:
        """What holds it in the first of the formats that has an entry for it."""
        entries = {OUR_FORMAT: Stored(self.name), **self.elsewhere}
        return next((entries[one] for one in formats if one in entries), None)


def is_lora_name(name: str) -> bool:
    """Whether a tensor is an adapter's A or B, or a moment of one."""
    return name.endswith((LORA_A, LORA_B))


def _lora_rank(config: MixtralConfig) -> int:
    return 0 if config.pet_config is None else config.pet_config.lora_rank


RANK = Axis("rank", _lora_rank)


def adapter_rows(row: ParameterRow) -> tuple[ParameterRow, ParameterRow]:
    """A and B of a matrix's adapter, y = x A^T B^T: (r, in) and (out, r), of experts (E, ...).

    A is cut as the matrix's inputs are, B as its outputs. Of a product that is cut, ranks that hold
    all of A or B have a part of its gradient each.
    """
    *experts, outputs, inputs = row.axes
    parts: GradientParts = "never" if row.tensor_axis is None else "always"
    return (
        ParameterRow(
            row.module + LORA_A,
            (*experts, RANK, inputs),
            initial="uniform",
            gradient_in_parts=parts,
        ),
        ParameterRow(
            row.module + LORA_B, (*experts, outputs, RANK), initial="zeros", gradient_in_parts=parts
        ),
    )
