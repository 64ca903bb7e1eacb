"""What a rank holds of global tensors, into its network."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from mindspore import Tensor

from mixtral_ms.checkpoint.formats.dtype_casts import cast
from mixtral_ms.checkpoint.formats.tensor_source import Region, TensorSource
from mixtral_ms.checkpoint.shards.assemble import is_optimizer_state
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.sharding_rules import (
    adapter_shapes,
    parameter_of,
    parameter_shapes,
    placements,
)


def load_parameters(
    network: MixtralForCausalLM,
    source: TensorSource,
    *,
    adapters: bool = False,
    partial: bool = False,
) -> None:
    """Copy what this rank holds of a source's global tensors into the network.

    Args:
        network: its weights, or its adapters alone.
        source: global tensors under our names; optimizer state in it is not looked at.
        adapters: which of the two.
        partial: leave parameters without a tensor as they are.

    Raises:
        UserError: a tensor is missing, surplus or of another shape; up to ten are named.
    """
    config = network.config
    shapes = adapter_shapes(config) if adapters else parameter_shapes(config)
    _require_shapes(source, shapes, partial=partial)
    names = [p.name for p in network.get_parameters() if p.name in shapes]
    own = OwnTensors(source, network, names, zero=False)
    for parameter in network.get_parameters():
        if parameter.name in own:
            # a copy: MindSpore keeps the array that it is given, and this one may be a file's
            parameter.set_data(Tensor.from_numpy(np.array(own[parameter.name])))


def _require_shapes(source: TensorSource, shapes: Mapping[str, tuple], *, partial: bool) -> None:
    found = {n: info.shape for n, info in source.infos.items() if not is_optimizer_state(n)}
    missing = () if partial else shapes.keys() - found.keys()
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not in the network" for name in found.keys() - shapes.keys()]
    problems += [
        f"{name} has shape {found[name]}, the network {shapes[name]}"
        for name in shapes.keys() & found.keys()
        if found[name] != shapes[name]
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise UserError(
            f"{source.path} does not fit model.model_config, {len(problems)} tensors differ:"
            f"\n  {shown}"
        )


class OwnTensors(Mapping[str, np.ndarray]):
    """What this rank holds of some global tensors, in float32, read when it is asked for.

    Args:
        source: global tensors; names that it lacks are left out.
        network: says layout and rank.
        names: of parameters on this rank, or of their moments.
        zero: whether moments are cut over replicas.
    """

    def __init__(
        self, source: TensorSource, network: MixtralForCausalLM, names: Iterable[str], zero: bool
    ) -> None:
        self._source = source
        self._regions = own_regions(network, [n for n in names if n in source.infos], zero=zero)

    def __getitem__(self, name: str) -> np.ndarray:
        values = self._source.read(name, self._regions[name])
        return cast(values, self._source.infos[name].dtype, "float32")

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)


def own_regions(
    network: MixtralForCausalLM, names: Iterable[str], *, zero: bool = False
) -> dict[str, Region]:
    """What this rank holds of parameters (or their moments) that are on its stage."""
    config, mesh = network.config, network.mesh
    shapes = parameter_shapes(config) | adapter_shapes(config)
    by_name = placements(config, mesh.grid, names, zero=zero)
    return {
        name: by_stage[mesh.stage].region(shapes[parameter_of(name)], mesh.rank)
        for name, by_stage in by_name.items()
    }
