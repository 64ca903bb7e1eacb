"""What a step adds up over its micro batches and ranks: loss, figures of the routers, squares.

Legend: L layers, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.pipeline_stages import stage_layers
from mixtral_ms.kernels.kernel_choice import UpdateKernels
from mixtral_ms.parallel.comm.process_groups import sum_tensor, sum_values, wait_for_all
from mixtral_ms.train.objectives.objective import Objective

Parts = tuple[Tensor, ...]
"""`Objective.stage_parts` of one micro batch, the layers those of this rank's stage."""
_PER_LAYER = 4  # figures beside the experts' load
_TARGETS_BASE = 4096  # its square is the last whole number that all before it are exact, in float32


@dataclass
class StepResult:
    """What one optimizer step did. The loss is the sum of its parts, see `Objective.means`."""

    loss: float
    parts: dict[str, float]
    tokens: int
    """Targets of the objective: supervised tokens, unless it counts others."""
    grad_norm: float
    skipped: bool
    expert_load: list[list[float]]
    drop_percent: list[float]
    router_entropy: list[float]


class Totals:
    """Sums of a step as one array, so that one message adds those of all ranks.

    Of ranks with the same sequences and layers one counts.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        config, mesh, count = objective.network.config, objective.network.mesh, objective.part_count
        layers, experts = config.num_layers, config.moe_config.expert_num
        self.values = np.zeros(1 + count + layers * (_PER_LAYER + experts))
        self.squares, self.sums = self.values[:1], self.values[1 : 1 + count]
        rest = self.values[1 + count :].reshape(layers, _PER_LAYER + experts)
        self.aux_L, self.z_L, self.dropped_L, self.entropy_L = rest[:, :_PER_LAYER].T
        self.load_LE = rest[:, _PER_LAYER:]
        own = stage_layers(config, mesh.grid.pipeline_stage, mesh.stage)
        self.own_layers = slice(own.start, own.stop)
        self.tokens_count = mesh.tensor_index == 0
        self.layers_count = mesh.tensor_index == 0 and mesh.context_index == 0

    def add(self, parts: list[np.ndarray]) -> None:
        """Add those of one micro batch."""
        count = self.objective.part_count
        aux_L, z_L, load_LE, dropped_L, entropy_L = parts[count:]
        if self.tokens_count:
            self.sums += parts[:count]
        if self.layers_count:
            self.aux_L[self.own_layers] += aux_L
            self.z_L[self.own_layers] += z_L
            self.load_LE[self.own_layers] += load_LE
            self.dropped_L[self.own_layers] += dropped_L
            self.entropy_L[self.own_layers] += entropy_L

    def result(self, targets: int, parts: int, norm: float, skipped: bool) -> StepResult:
        """The means: over targets of the objective's sums, over micro batches of all else.

        The routers' figures are means over micro batches that are not padding alone: of each of
        those a layer's loads add up to 1.
        """
        router_sums = self.aux_L.sum(), self.z_L.sum()
        means = self.objective.means(self.sums.tolist(), router_sums, max(1, targets), parts)
        routed_L = np.maximum(1.0, np.round(self.load_LE.sum(1)))
        return StepResult(
            loss=sum(means.values()),
            parts=means,
            tokens=targets,
            grad_norm=norm,
            skipped=skipped,
            expert_load=(self.load_LE / routed_L[:, None]).tolist(),
            drop_percent=(100.0 * self.dropped_L / routed_L).tolist(),
            router_entropy=(self.entropy_L / routed_L).tolist(),
        )


class HostTotals:
    """Adds on the host, in float64: reads every part of every micro batch and every norm.

    Args:
        objective: whose parts they are.
        kernels: for the squares.
    """

    def __init__(self, objective: Objective, kernels: UpdateKernels) -> None:
        self.objective, self.kernels = objective, kernels
        self.mesh = objective.network.mesh

    def count_targets(self, own: int) -> None:
        """Of all ranks together, from this rank's of a step."""
        self.targets = int(sum_values(self.mesh.tokens, own))

    def weight(self, loss_scale: float) -> Tensor:
        """The loss scale over the targets that were counted."""
        return Tensor(loss_scale / max(1, self.targets), mstype.float32)

    def __call__(self, outputs: Sequence[Parts], counted: Iterable[Tensor]) -> Totals:
        """Sums over micro batches and ranks.

        Args:
            outputs: of the micro batches.
            counted: gradients whose squares this rank counts.
        """
        totals = Totals(self.objective)
        totals.squares[0] = sum(self.kernels.sum_of_squares(one) for one in counted)
        for parts in outputs:
            totals.add([part.asnumpy() for part in parts])
        totals.values[:] = sum_values(self.mesh.world, totals.values)
        return totals


class DeviceTotals(HostTotals):
    """Adds on the device, in float32, and reads the sums at once: the host waits once a step.

    It does so before the update. What the update does is then launched while the device works, and
    so is the next step: a host that waited behind the update would leave the device idle until
    then. And the rates of fused operators are numbers of the host.
    """

    def count_targets(self, own: int) -> None:
        """As `HostTotals.count_targets`, exact up to 2^36."""
        halves = Tensor(divmod(own, _TARGETS_BASE), mstype.float32)
        self._halves = sum_tensor(self.mesh.tokens, halves)

    def weight(self, loss_scale: float) -> Tensor:
        """As `HostTotals.weight`."""
        targets = self._halves[0] * _TARGETS_BASE + self._halves[1]
        return loss_scale / ops.maximum(targets, Tensor(1.0, mstype.float32))

    def __call__(self, outputs: Sequence[Parts], counted: Iterable[Tensor]) -> Totals:
        """As `HostTotals.__call__`."""
        totals = Totals(self.objective)
        own = ops.concat([self._squares(counted), *self._figures(totals, outputs)])
        if self.mesh.world.size > 1:
            wait_for_all()
        own = sum_tensor(self.mesh.world, own)
        values = ops.concat([own, self._halves]).asnumpy().astype(np.float64)
        totals.values[:] = values[:-2]
        high, low = values[-2:]
        self.targets = int(high) * _TARGETS_BASE + int(low)
        return totals

    def _squares(self, counted: Iterable[Tensor]) -> Tensor:
        squares = [self.kernels.squares(one) for one in counted]
        return ops.reshape(ops.sum(ops.stack(squares)), (1,)) if squares else _zeros(1)

    def _figures(self, totals: Totals, outputs: Sequence[Parts]) -> list[Tensor]:
        """Behind the squares, in the order of `Totals`."""
        count = self.objective.part_count
        summed = [ops.sum(ops.stack(list(parts)), 0) for parts in zip(*outputs, strict=True)]
        aux_L, z_L, load_LE, dropped_L, entropy_L = summed[count:]
        columns = [ops.expand_dims(one, 1) for one in (aux_L, z_L, dropped_L, entropy_L)]
        own_layers = ops.reshape(ops.concat([*columns, load_LE], 1), (-1,))
        layers, width = len(totals.aux_L), _PER_LAYER + load_LE.shape[1]
        before, behind = totals.own_layers.start, layers - totals.own_layers.stop
        pieces = [_zeros(count)]
        if totals.tokens_count:
            pieces = [ops.reshape(one, (1,)) for one in summed[:count]]
        if not totals.layers_count:
            return [*pieces, _zeros(layers * width)]
        pieces += [_zeros(before * width)] if before else []
        return [*pieces, own_layers, *([_zeros(behind * width)] if behind else [])]


def _zeros(count: int) -> Tensor:
    return Tensor(np.zeros(count, np.float32))
