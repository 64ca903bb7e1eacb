"""One training step: gradient accumulation, sums over ranks, the norm, the update.

The host stands between the graphs: it sees the norm, and so decides on clipping, on skipping a
step that overflowed, and on the loss scale, without a second copy of the gradients. The norm is
that of all ranks together, so they all decide alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter, Tensor, ops

from mixtral_ms.config.derived.pipeline_stages import stage_layers
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.gradient_reduction import gradient_rules
from mixtral_ms.parallel.comm.process_groups import gather_objects, sum_values
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes, parameter_shapes
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective, Objective
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.gradients import Graphs, MicroBatchGradients
from mixtral_ms.train.step.pipeline_gradients import PipelineGradients


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


class TrainStep:
    """Forward, backward and update over the micro batches of one global batch.

    On several ranks each calls it with its own sequences (with context parallel, parts of them);
    what it returns is that of the global batch, the same on all of them.

    Args:
        network: the model, its shapes those of one micro batch on this rank.
        optimizer: updates `network`'s trainable parameters.
        accumulation: micro batches of a rank in a step, those in the pipeline included.
        max_grad_norm: clip gradients to this global norm; None leaves them.
        objective: what it makes smaller.
    """

    def __init__(
        self,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
        objective: MakeObjective = CausalLMObjective,
    ) -> None:
        network.set_train()
        self.network, self.optimizer = network, optimizer
        self.objective = objective(network)
        self.mesh = network.mesh
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        names = [parameter.name for parameter in network.trainable_params()]
        zero = bool(optimizer.shards)
        self._rules = gradient_rules(network.config, self.mesh, names, zero=zero)
        stages = self.mesh.grid.pipeline_stage
        kind = PipelineGradients if stages > 1 else MicroBatchGradients
        self._gradients = kind(self.objective, accumulation)
        self._last_gradients: list[Tensor] = []

    def __call__(
        self,
        micro_batches: list[Batch],
        learning_rate: float,
        loss_scale: float = 1.0,
        before: Callable[[int], None] = lambda index: None,
    ) -> StepResult:
        """Train on one global batch; with a non-finite gradient nothing is changed.

        `before` is called with the number of each micro batch, counted from 0.
        """
        if len(micro_batches) != self.accumulation:
            raise ValueError(
                f"{len(micro_batches)} micro batches given, {self.accumulation} expected"
            )
        own_targets = sum(self.objective.targets(batch) for batch in micro_batches)
        targets = max(1, int(sum_values(self.mesh.tokens, own_targets)))
        parts = self.accumulation * self.mesh.grid.data_parallel
        outputs, own = self._gradients(
            micro_batches, loss_scale / targets, loss_scale / parts, before
        )
        gradients = self._reduce(list(own))
        del own  # it holds gradients that were replaced
        totals = self._totals(outputs, self._counted_squares(gradients))
        norm = math.sqrt(totals.squares[0]) / loss_scale
        skipped = not math.isfinite(norm)
        # Kept only for the diagnosis: holding them longer costs the model's size in memory.
        self._last_gradients = gradients if skipped else []
        if not skipped:
            self.optimizer.update(tuple(gradients), learning_rate, self._factor(norm) / loss_scale)
        return totals.result(targets, parts, norm, skipped)

    def graphs(self, batch: Batch) -> Graphs:
        """What is compiled for micro batches like this one, in that order, with its inputs."""
        return self._gradients.graphs(batch)

    def first_non_finite_gradient(self) -> str | None:
        """Name of the first parameter, in the order of the network, with a NaN or infinity.

        Speaks of the last step, and only if that step was skipped. All ranks must ask.
        """
        own = None
        for name, gradient in zip(self._rules, self._last_gradients):  # noqa: B905 - empty after a good step
            if not np.isfinite(gradient.asnumpy()).all():
                own = name
                break
        return first_of_ranks(self.network, own)

    def _reduce(self, gradients: list[Tensor]) -> list[Tensor]:
        """One by one and in place, so that only one gradient is there twice."""
        for index, rule in enumerate(self._rules.values()):
            own, reduced = gradients[index], rule.reduce(gradients[index])
            if reduced is not own and isinstance(own, Parameter) and own.shape == reduced.shape:
                ops.assign(own, reduced)  # sums of micro batches stay where they are
            else:
                gradients[index] = reduced
        return gradients

    def _counted_squares(self, gradients: list[Tensor]) -> float:
        """This rank's share of the squared norm."""
        squares, rules = self.optimizer.kernels.sum_of_squares, self._rules.values()
        return sum(
            squares(gradient) if rule.counted else 0.0
            for gradient, rule in zip(gradients, rules, strict=True)
        )

    def _totals(self, outputs: list[tuple[Tensor, ...]], squares: float) -> "_Totals":
        """Sums over micro batches and ranks."""
        own = _Totals(self.objective)
        own.squares[0] = squares
        for parts in outputs:
            own.add([part.asnumpy() for part in parts])
        own.values[:] = sum_values(self.mesh.world, own.values)
        return own

    def _factor(self, norm: float) -> float:
        if self.max_grad_norm is None or norm <= self.max_grad_norm:
            return 1.0
        return self.max_grad_norm / norm


def first_of_ranks(network: MixtralForCausalLM, name: str | None) -> str | None:
    """Of the parameters that the ranks name the first one in the order of the network."""
    order = list(parameter_shapes(network.config) | adapter_shapes(network.config))
    named = [one for one in gather_objects(network.mesh.world, name) if one is not None]
    return min(named, key=order.index, default=None)


class _Totals:
    """Sums of a step as one array, so that one message adds those of all ranks.

    Of ranks with the same sequences and layers one counts.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        config, mesh, count = objective.network.config, objective.network.mesh, objective.part_count
        layers, experts = config.num_layers, config.moe_config.expert_num
        self.values = np.zeros(1 + count + layers * (4 + experts))
        self.squares, self.sums = self.values[:1], self.values[1 : 1 + count]
        rest = self.values[1 + count :].reshape(layers, 4 + experts)
        self.aux_L, self.z_L, self.dropped_L, self.entropy_L = rest[:, :4].T
        self.load_LE = rest[:, 4:]
        own = stage_layers(config, mesh.grid.pipeline_stage, mesh.stage)
        self._own = slice(own.start, own.stop)
        self._tokens_count = mesh.tensor_index == 0
        self._layers_count = mesh.tensor_index == 0 and mesh.context_index == 0

    def add(self, parts: list[np.ndarray]) -> None:
        """Add `Objective.stage_parts` of one micro batch, the layers those of this rank's stage."""
        count = self.objective.part_count
        aux_L, z_L, load_LE, dropped_L, entropy_L = parts[count:]
        if self._tokens_count:
            self.sums += parts[:count]
        if self._layers_count:
            self.aux_L[self._own] += aux_L
            self.z_L[self._own] += z_L
            self.load_LE[self._own] += load_LE
            self.dropped_L[self._own] += dropped_L
            self.entropy_L[self._own] += entropy_L

    def result(self, targets: int, parts: int, norm: float, skipped: bool) -> StepResult:
        """The means: over targets of the objective's sums, over micro batches of all else."""
        router_sums = self.aux_L.sum(), self.z_L.sum()
        means = self.objective.means(self.sums.tolist(), router_sums, targets, parts)
        return StepResult(
            loss=sum(means.values()),
            parts=means,
            tokens=targets,
            grad_norm=norm,
            skipped=skipped,
            expert_load=(self.load_LE / parts).tolist(),
            drop_percent=(100.0 * self.dropped_L / parts).tolist(),
            router_entropy=(self.entropy_L / parts).tolist(),
        )
