"""Gradient reduction: whose gradients of a parameter are added, and what this rank needs of it.

A rank's backward pass sees its own tokens, so gradients are added over the ranks with other tokens.
Ranks that hold the same parameter for the same tokens have the same gradient, except where each of
them met the parameter with a part of the work: of the sequence, or of a LoRA product.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mindspore import Tensor

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.parallel.comm.process_groups import own_part, sum_and_scatter, sum_tensor
from mixtral_ms.parallel.grid.mesh import ALONE, Mesh, ProcessGroup
from mixtral_ms.parallel.grid.placement import Placement
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS, placements


@dataclass(frozen=True)
class GradientRule:
    """What becomes of this rank's gradient of one parameter."""

    groups: tuple[ProcessGroup, ...]
    """Over which it is added, one after the other."""
    shard: ProcessGroup | None
    """The replicas that share out its optimizer moments along axis 0; None keeps them whole."""
    counted: bool
    """Whether this rank's part of the sum counts in the norm; of equal parts one does."""

    @property
    def scatters(self) -> bool:
        """Whether the ranks over which it is first added are those that share its moments out."""
        return self.shard is not None and self.shard.ranks == self.groups[0].ranks

    def after_scatter(self) -> "GradientRule":
        """What is left to do for a gradient that was added and cut over the first group."""
        return replace(self, groups=(ALONE, *self.groups[1:]), shard=None)

    def reduce(self, gradient: Tensor) -> Tensor:
        """The part of the summed gradient that this rank's moments are of."""
        first, *others = self.groups
        if self.shard is None:
            gradient = sum_tensor(first, gradient)
        elif self.scatters:
            gradient = sum_and_scatter(first, gradient)
        else:
            gradient = own_part(self.shard, sum_tensor(first, gradient))
        for group in others:
            gradient = sum_tensor(group, gradient)
        return gradient


def gradient_rules(
    config: MixtralConfig, mesh: Mesh, names: Iterable[str], *, zero: bool
) -> dict[str, GradientRule]:
    """The rules of this rank's parameters, by name.

    Args:
        config: the network.
        mesh: this rank. Groups that do not exist yet are made, so all ranks of a stage must call
            this with the same names.
        names: parameters on this rank's stage.
        zero: cut the optimizer moments over replicas, as `sharding_rules.placements` says.
    """
    names = list(names)
    by_name = placements(config, mesh.grid, [MOMENTS[0] + name for name in names], zero=zero)
    return {name: _rule(name, by_name[MOMENTS[0] + name], mesh) for name in names}


def shard_groups(
    config: MixtralConfig, mesh: Mesh, names: Iterable[str]
) -> dict[str, ProcessGroup]:
    """For ZeRO-1: of each parameter whose moments are cut, the replicas that share them out."""
    rules = gradient_rules(config, mesh, names, zero=True)
    return {name: rule.shard for name, rule in rules.items() if rule.shard is not None}


def _rule(name: str, by_stage: dict[int, Placement], mesh: Mesh) -> GradientRule:
    placement = by_stage[mesh.stage]
    replicas = mesh.group(_replicas(placement, mesh.rank))
    groups = [replicas if _partial(name, mesh) else mesh.tokens]
    groups += [mesh.pair(mesh.beside(other)) for other in by_stage if other != mesh.stage]
    shard = replicas if placement.shards > 1 else None
    first = mesh.stage == min(by_stage) and (shard is not None or replicas.index == 0)
    return GradientRule(tuple(groups), shard, first)


@functools.lru_cache
def _replicas(placement: Placement, rank: int) -> tuple[int, ...]:
    return placement.replicas_of(rank)


def _partial(name: str, mesh: Mesh) -> bool:
    """Whether every replica has but a part of the gradient, tensor-parallel ones included."""
    row = row_of(name)
    if row.expert_axis is not None or row.gradient_in_parts == "always":
        return True
    return mesh.grid.use_seq_parallel and row.gradient_in_parts == "of sequence"
