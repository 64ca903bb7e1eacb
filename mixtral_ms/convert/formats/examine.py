"""What weights are, compared with what is said of them: before a conversion, and for `inspect`."""

from dataclasses import dataclass
from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.formats.atom_audit import source_problems
from mixtral_ms.convert.formats.detect_format import (
    Measured,
    detect_format,
    measure,
    measured_config,
)
from mixtral_ms.convert.formats.foreign_config import FoundConfig, check_sizes, read_config
from mixtral_ms.convert.formats.found_weights import FoundWeights
from mixtral_ms.convert.formats.tensor_layouts import layout_of
from mixtral_ms.convert.formats.weight_names import Format
from mixtral_ms.errors import UserError


@dataclass(frozen=True)
class Examined:
    """Weights whose format and sizes are known.

    Attributes:
        format: of the tensors.
        sizes: as the tensors show them.
        measured: a network of these sizes.
        found: what lies with them, or was named, as their configuration; None for nothing.
    """

    format: Format
    sizes: dict[str, Measured]
    measured: MixtralConfig
    found: FoundConfig | None


def examine(
    weights: FoundWeights,
    source: TensorSource,
    *,
    input_format: str | None = None,
    config: Path | None = None,
) -> Examined:
    """Find out format and sizes, and compare them with the configuration.

    Args:
        weights: what `find_weights` answered.
        source: its tensors.
        input_format: name of their format, where the user says it.
        config: YAML or JSON of the network, where the user names one.

    Raises:
        UserError: tensors are of no format, too few to tell, or contradict the configuration.
    """
    format_ = detect_format(source.infos, source.path, input_format or weights.format_name)
    sizes = measure(source.infos, format_, source.path)
    measured = measured_config(source.infos, format_, sizes)
    found = read_config(config) if config else weights.network
    if found:
        check_sizes(found, sizes, measured.tie_word_embeddings)
    return Examined(format_, sizes, measured, found)


def weight_problems(weights: FoundWeights, source: TensorSource) -> list[str]:
    """Why weights could not be converted or loaded, one line each."""
    try:
        examined = examine(weights, source)
        network = examined.found.config if examined.found else examined.measured
        problems, _ = source_problems(source.infos, layout_of(examined.format, network))
    except UserError as error:
        return [str(error)]
    return [f"{name} {problem}" for name, problem in problems.items()]
