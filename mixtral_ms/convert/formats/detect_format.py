"""Which format weights are in, and the sizes of the network they make, from names and shapes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo
from mixtral_ms.config.derived.parameter_row import ParameterRow, Stored
from mixtral_ms.config.derived.parameter_table import (
    EMBEDDING,
    EXPERT_DOWN,
    KEY,
    LM_HEAD,
    OUTPUT_BIAS,
    QUERY,
    QUERY_BIAS,
    ROUTER,
)
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.convert.formats.weight_names import (
    FORMATS,
    GMM,
    GMM_OLD,
    MINDFORMERS_OLD,
    OURS,
    Format,
)
from mixtral_ms.errors import UserError

_SAME_NAMES = {OURS.name: GMM, MINDFORMERS_OLD.name: GMM_OLD}
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Measured:
    """A size and the tensor that shows it."""

    value: int
    tensor: str
    shape: tuple[int, ...]


def detect_format(infos: Mapping[str, TensorInfo], where: object, named: str | None) -> Format:
    """The format of tensors.

    Args:
        infos: the tensors.
        where: the file or folder, for messages.
        named: the format that the user, or a record beside the file, says it is.

    Raises:
        UserError: they are in no known format, in another than the one named, or their shapes
            allow two.
    """
    by_count = sorted(FORMATS.values(), key=lambda one: -_matches(one, infos))
    found = by_count[0]
    if not _matches(found, infos):
        shown = ", ".join(list(infos)[:_NAMES_SHOWN])
        raise UserError(
            f"{where}: its {len(infos)} tensors ({shown}, ...) are not named as in any format of "
            f"Mixtral's weights that is known here: {', '.join(FORMATS)}"
        )
    if named is not None:
        if _matches(FORMATS[named], infos) < _matches(found, infos):
            raise UserError(
                f"{where}: is said to be in format {named}, its names are {found.name}'s"
            )
        return FORMATS[named]
    if found.name in _SAME_NAMES:
        return _by_shape(found, infos, where)
    return found


def _matches(format_: Format, infos: Mapping[str, TensorInfo]) -> int:
    """How many tensors have a name of the format."""
    names = re.compile("|".join(_pattern(entry.stored, r"\d+") for entry in format_.entries))
    return sum(names.fullmatch(name) is not None for name in infos)


def _pattern(stored: Stored, layer: str) -> str:
    """A regular expression for the tensors of all layers and experts."""
    return re.escape(stored.name).replace(r"\{layer\}", layer).replace(r"\{expert\}", r"\d+")


def _by_shape(stacked: Format, infos: Mapping[str, TensorInfo], where: object) -> Format:
    """Stacked experts or those of the grouped matmul: which axis of w2 is the hidden size."""
    name, shape = _tensor(infos, stacked, EXPERT_DOWN, where)
    hidden = _tensor(infos, stacked, EMBEDDING, where)[1][-1]
    grouped = _SAME_NAMES[stacked.name]
    if len(shape) != 3 or hidden not in shape[1:]:  # noqa: PLR2004
        raise UserError(
            f"{where}: {name} has shape {shape}; stacked experts with hidden size {hidden} are "
            f"(E, {hidden}, F), or (E, F, {hidden}) for the grouped matmul"
        )
    if shape[1] == shape[2]:
        raise UserError(
            f"{where}: {name} has shape {shape}, so the experts may be in format {stacked.name} or "
            f"{grouped.name}: say which with --input_format"
        )
    return stacked if shape[1] == hidden else grouped


def _tensor(
    infos: Mapping[str, TensorInfo], format_: Format, row: ParameterRow, where: object
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the tensor that holds one of our parameters, in layer 0 and expert 0."""
    name = _template(format_, row).format(layer=0, expert=0)
    if name not in infos:
        raise UserError(f"{where}: lacks the tensor {name} of format {format_.name}")
    return name, infos[name].shape


def _template(format_: Format, row: ParameterRow) -> str:
    """Name, with {layer} and {expert}, of what holds a parameter; empty where nothing does."""
    stored = format_.stored(row)
    return "" if stored is None else stored.name


def measure(infos: Mapping[str, TensorInfo], format_: Format, where: object) -> dict[str, Measured]:
    """The network's sizes as the tensors show them.

    Returns:
        vocab_size, hidden_size, num_layers, query_width (num_heads * head_dim), key_value_width,
        expert_num and intermediate_size.

    Raises:
        UserError: a tensor that shows one of them is missing or has another number of axes.
    """
    sizes: dict[str, Measured] = {}
    for row, axes in (
        (EMBEDDING, {"vocab_size": 0, "hidden_size": 1}),
        (QUERY, {"query_width": 0}),
        (KEY, {"key_value_width": 0}),
        (ROUTER, {"expert_num": 0}),
    ):
        name, shape = _tensor(infos, format_, row, where)
        if len(shape) != 2:  # noqa: PLR2004
            raise UserError(f"{where}: {name} has shape {shape}; it must have two axes")
        sizes |= {size: Measured(shape[axis], name, shape) for size, axis in axes.items()}
    down, shape = _tensor(infos, format_, EXPERT_DOWN, where)
    experts = 1 if "{expert}" in _template(format_, EXPERT_DOWN) else sizes["expert_num"].value
    one = max(1, experts * sizes["hidden_size"].value)
    sizes["intermediate_size"] = Measured(math.prod(shape) // one, down, shape)
    sizes["num_layers"] = _last_layer(infos, format_)
    return sizes


def _last_layer(infos: Mapping[str, TensorInfo], format_: Format) -> Measured:
    inside = [entry for entry in format_.entries if entry.rows[0].stage == "layer"]
    patterns = [_pattern(entry.stored, r"(\d+)") for entry in inside]
    layers = {
        int(match[1]): name
        for pattern in patterns
        for name in infos
        if (match := re.fullmatch(pattern, name))
    }
    last = max(layers)
    return Measured(last + 1, layers[last], infos[layers[last]].shape)


def measured_config(
    infos: Mapping[str, TensorInfo], format_: Format, sizes: Mapping[str, Measured]
) -> MixtralConfig:
    """A configuration whose parameters have the measured shapes.

    Only widths show in shapes: the number of heads here is the smallest that fits, and what is
    not a size has its default. Good for `parameter_shapes`, not for running the network.
    """
    query, key_value = sizes["query_width"].value, sizes["key_value_width"].value
    head = max(1, math.gcd(query, key_value))

    def holds(row: ParameterRow) -> bool:
        return _template(format_, row).format(layer=0) in infos

    return MixtralConfig(
        vocab_size=sizes["vocab_size"].value,
        hidden_size=sizes["hidden_size"].value,
        num_layers=sizes["num_layers"].value,
        num_heads=query // head,
        n_kv_heads=key_value // head,
        head_dim=head,
        intermediate_size=sizes["intermediate_size"].value,
        qkv_has_bias=holds(QUERY_BIAS),
        attn_proj_has_bias=holds(OUTPUT_BIAS),
        tie_word_embeddings=not holds(LM_HEAD),
        moe_config=MoEConfig(expert_num=sizes["expert_num"].value),
    )
