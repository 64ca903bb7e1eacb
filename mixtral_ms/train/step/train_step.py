"""One training step: gradient accumulation, sums over ranks, the norm, the update.

The host stands between the graphs: it sees the norm, and so decides on clipping, on skipping a
step that overflowed, and on the loss scale, without a second copy of the gradients. The norm is
that of all ranks together, so they all decide alike. How often the host waits for the device to
see it: totals.py.
"""

import math
from collections.abc import Callable

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.config.loading.step_choices import StepChoices
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.gradient_buckets import GradientReduction
from mixtral_ms.parallel.comm.gradient_reduction import gradient_rules
from mixtral_ms.parallel.comm.process_groups import gather_objects
from mixtral_ms.parallel.grid.sharding_rules import adapter_shapes, parameter_shapes
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.gradients import Graphs, MicroBatchGradients
from mixtral_ms.train.step.pipeline_gradients import PipelineGradients
from mixtral_ms.train.step.totals import DeviceTotals, HostTotals, StepResult
from mixtral_ms.train.step.working_weights import WorkingWeights

_PLAIN = StepChoices()


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
        choices: how; the numbers are the same, within rounding.
        working: of `network`, to compute with; None computes with its own weights.
    """

    def __init__(
        self,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
        objective: MakeObjective = CausalLMObjective,
        choices: StepChoices = _PLAIN,
        working: WorkingWeights | None = None,
    ) -> None:
        self.network, self.optimizer, self._working = network, optimizer, working
        for one in (network, *([working.network] if working else [])):
            one.set_train()
        self.objective = objective(working.network if working else network)
        self.mesh = network.mesh
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        names = [parameter.name for parameter in network.trainable_params()]
        zero = bool(optimizer.shards)
        self._rules = gradient_rules(network.config, self.mesh, names, zero=zero)
        cut = {n: rule for n, rule in self._rules.items() if choices.cut_sums and rule.scatters}
        left = self._rules | {name: rule.after_scatter() for name, rule in cut.items()}
        self._reduce = GradientReduction(list(left.values()), choices.bucket_bytes)
        stages = self.mesh.grid.pipeline_stage
        kind = PipelineGradients if stages > 1 else MicroBatchGradients
        shards = {name: rule.groups[0] for name, rule in cut.items()}
        self._gradients = kind(self.objective, accumulation, shards)
        kind_of_totals = DeviceTotals if choices.one_host_read else HostTotals
        self.totals = kind_of_totals(self.objective, optimizer.kernels)
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
        self.totals.count_targets(sum(map(self.objective.targets, micro_batches)))
        parts = self.accumulation * self.mesh.grid.data_parallel
        weights = self.totals.weight(loss_scale), Tensor(loss_scale / parts, mstype.float32)
        if self._working:
            self._working.refresh()
        outputs, own = self._gradients(micro_batches, weights, before)
        gradients = self._reduce(list(own))
        del own  # it holds gradients that were replaced
        totals = self.totals(outputs, self._counted(gradients))
        norm = math.sqrt(totals.squares[0]) / loss_scale
        skipped = not math.isfinite(norm)
        # Kept only for the diagnosis: holding them longer costs the model's size in memory.
        self._last_gradients = gradients if skipped else []
        if not skipped:
            self.optimizer.update(tuple(gradients), learning_rate, self._factor(norm) / loss_scale)
        return totals.result(self.totals.targets, parts, norm, skipped)

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

    def _counted(self, gradients: list[Tensor]) -> list[Tensor]:
        """Those whose squares this rank adds to the norm."""
        rules = self._rules.values()
        return [one for one, rule in zip(gradients, rules, strict=True) if rule.counted]

    def _factor(self, norm: float) -> float:
        if self.max_grad_norm is None or norm <= self.max_grad_norm:
            return 1.0
        return self.max_grad_norm / norm


def first_of_ranks(network: MixtralForCausalLM, name: str | None) -> str | None:
    """Of the parameters that the ranks name the first one in the order of the network."""
    order = list(parameter_shapes(network.config) | adapter_shapes(network.config))
    named = [one for one in gather_objects(network.mesh.world, name) if one is not None]
    return min(named, key=order.index, default=None)
