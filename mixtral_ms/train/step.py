"""One training step as compiled graphs: gradients of micro batches, their norm, the update.

The host stands between the graphs: it sees the norm, and so decides on clipping, on skipping a
step that overflowed, and on the loss scale, without a second copy of the gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.optimizer import AdamW


@dataclass
class StepResult:
    """What one optimizer step did. Losses are means per supervised token, the factors included."""

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    tokens: int
    grad_norm: float
    skipped: bool
    expert_load: list[list[float]]
    drop_percent: list[float]
    router_entropy: list[float]


class TrainStep:
    """Forward, backward and update over the micro batches of one global batch.

    Args:
        network: the model, its shapes those of one micro batch.
        optimizer: updates `network`'s trainable parameters.
        accumulation: micro batches a step.
        max_grad_norm: clip gradients to this global norm; None leaves them.
    """

    def __init__(
        self,
        network: MixtralForCausalLM,
        optimizer: AdamW,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        network.set_train()
        self.network, self.optimizer = network, optimizer
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        if accumulation > 1:
            self._gradients = _AccumulateGradients(network)
            self._clear = _Clear(self._gradients.sums)
        else:
            self._gradients = _Gradients(network)
        self._last_gradients: tuple[Tensor, ...] = ()

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
        tokens = max(1, sum(batch.supervised_tokens for batch in micro_batches))
        totals = _Totals(tokens, self.accumulation)
        if self.accumulation > 1:
            self._clear()  # not after the step: the diagnosis of a skipped one reads the sums
        for index, batch in enumerate(micro_batches):
            before(index)
            outputs, gradients = self._gradients(
                Tensor(batch.input_ids),
                Tensor(batch.labels),
                Tensor(loss_scale / tokens, mstype.float32),
                Tensor(loss_scale / self.accumulation, mstype.float32),
                *segment_tensors(batch),
            )
            totals.add(outputs)
        norm = self._global_norm(gradients) / loss_scale
        skipped = not math.isfinite(norm)
        # Kept only for the diagnosis: holding them longer costs the model's size in memory.
        self._last_gradients = gradients if skipped else ()
        if not skipped:
            self.optimizer.update(gradients, learning_rate, self._factor(norm) / loss_scale)
        return totals.result(norm, skipped)

    def first_non_finite_gradient(self) -> str | None:
        """Name of the first parameter, in the order of the network, with a NaN or infinity.

        Speaks of the last step, and only if that step was skipped.
        """
        for parameter, gradient in zip(self.network.trainable_params(), self._last_gradients):  # noqa: B905 - empty after a good step
            if not np.isfinite(gradient.asnumpy()).all():
                return parameter.name
        return None

    def _global_norm(self, gradients: tuple[Tensor, ...]) -> float:
        squares = self.optimizer.kernels.sum_of_squares
        return math.sqrt(sum(squares(gradient) for gradient in gradients))

    def _factor(self, norm: float) -> float:
        if self.max_grad_norm is None or norm <= self.max_grad_norm:
            return 1.0
        return self.max_grad_norm / norm


def segment_tensors(batch: Batch) -> tuple[Tensor, ...]:
    """Segment ids and positions of a packed batch, nothing otherwise: that graph goes without."""
    if batch.segment_ids is None:
        return ()
    return Tensor(batch.segment_ids), Tensor(batch.positions)


class _Totals:
    """Sums the outputs of micro batches on the host."""

    def __init__(self, tokens: int, accumulation: int) -> None:
        self.tokens, self.accumulation = tokens, accumulation
        self.lm = self.aux = self.z = 0.0
        self.router: list[np.ndarray] | None = None

    def add(self, outputs: tuple[Tensor, ...]) -> None:
        lm_sum, _, aux_L, z_L, *router = [value.asnumpy() for value in outputs]
        self.lm += float(lm_sum)
        self.aux += float(aux_L.sum()) / self.accumulation
        self.z += float(z_L.sum()) / self.accumulation
        values = [value / self.accumulation for value in router]
        if self.router is None:
            self.router = values
        else:
            self.router = [a + b for a, b in zip(self.router, values, strict=True)]

    def result(self, norm: float, skipped: bool) -> StepResult:
        load_LE, dropped_L, entropy_L = self.router
        lm = self.lm / self.tokens
        return StepResult(
            loss=lm + self.aux + self.z,
            lm_loss=lm,
            aux_loss=self.aux,
            z_loss=self.z,
            tokens=self.tokens,
            grad_norm=norm,
            skipped=skipped,
            expert_load=load_LE.tolist(),
            drop_percent=(100.0 * dropped_L).tolist(),
            router_entropy=entropy_L.tolist(),
        )


class _Objective(nn.Cell):
    """The scalar whose gradient a micro batch adds, and the parts of the loss."""

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        per_token: Tensor,
        per_micro: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        parts = self.network.loss_parts(input_ids_BS, labels_BS, segment_ids_BS, positions_BS)
        objective = parts[0] * per_token + (ops.sum(parts[2]) + ops.sum(parts[3])) * per_micro
        return (objective, *parts)


class _Gradients(nn.Cell):
    """Loss parts and gradients of one micro batch."""

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(network.trainable_params())
        self.differentiate = mindspore.value_and_grad(
            _Objective(network), None, self.weights, has_aux=True
        )

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        per_token: Tensor,
        per_micro: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        outputs, gradients = self.differentiate(
            input_ids_BS, labels_BS, per_token, per_micro, segment_ids_BS, positions_BS
        )
        return outputs[1:], gradients


class _AccumulateGradients(_Gradients):
    """As `_Gradients`, adding to one sum per parameter."""

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(network)
        self.sums = ParameterTuple(
            [
                Parameter(
                    Tensor.from_numpy(np.zeros(p.shape, np.float32)),
                    f"grad_sum.{p.name}",
                    requires_grad=False,
                )
                for p in self.weights
            ]
        )

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        per_token: Tensor,
        per_micro: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        outputs, gradients = self.differentiate(
            input_ids_BS, labels_BS, per_token, per_micro, segment_ids_BS, positions_BS
        )
        sums = ()
        for i in range(len(self.sums)):
            sums += (ops.assign_add(self.sums[i], gradients[i]),)
        return outputs[1:], sums


class _Clear(nn.Cell):
    """Sets sums of gradients back to zero."""

    def __init__(self, sums: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.sums = sums

    def construct(self) -> bool:
        for value in self.sums:
            ops.assign(value, ops.zeros_like(value))
        return True
