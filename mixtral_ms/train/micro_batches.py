"""Gradients of the micro batches of one step, as compiled graphs.

Legend: B batch, S sequence, L layers, E experts.
"""

from collections.abc import Callable

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.connection import compile_together


class MicroBatchGradients:
    """Forward and backward of every micro batch of a step, on a network without pipeline stages.

    Args:
        network: the model, its shapes those of one micro batch.
        accumulation: micro batches a step.
    """

    def __init__(self, network: MixtralForCausalLM, accumulation: int) -> None:
        self._clear, self._mesh, self._compiled = None, network.mesh, False
        if accumulation > 1:
            self._gradients = _AccumulateGradients(network)
            self._clear = ClearSums(self._gradients.sums)
        else:
            self._gradients = _Gradients(network)

    def __call__(
        self,
        micro_batches: list[Batch],
        per_token: float,
        per_micro: float,
        before: Callable[[int], None],
    ) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Run all of them.

        Args:
            micro_batches: as many as `accumulation`.
            per_token: weight of the summed cross entropy in what is differentiated.
            per_micro: weight of the aux and z losses.
            before: called with the number of each micro batch, from 0.

        Returns:
            For each micro batch what `loss_parts` gives, and the gradients' sums over all of them.
        """
        if self._clear:
            self._clear()  # not after the step: the diagnosis of a skipped one reads the sums
        outputs, gradients = [], ()
        weights = [Tensor(weight, mstype.float32) for weight in (per_token, per_micro)]
        for index, batch in enumerate(micro_batches):
            before(index)
            ids, labels = Tensor(batch.input_ids), Tensor(batch.labels)
            inputs = (ids, labels, *weights, *segment_tensors(batch))
            if not self._compiled:
                compile_together(self._mesh, {self._gradients: inputs})
                self._compiled = True
            parts, gradients = self._gradients(*inputs)
            outputs.append(parts)
        return outputs, gradients


def segment_tensors(batch: Batch) -> tuple[Tensor, ...]:
    """Segment ids and positions of a packed batch, nothing otherwise: that graph goes without."""
    if batch.segment_ids is None:
        return ()
    return Tensor(batch.segment_ids), Tensor(batch.positions)


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
        self.sums = gradient_sums(self.weights)

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


def gradient_sums(weights: ParameterTuple) -> ParameterTuple:
    """For each parameter a sum of its gradients."""
    return ParameterTuple(
        [
            Parameter(
                Tensor.from_numpy(np.zeros(p.shape, np.float32)),
                f"grad_sum.{p.name}",
                requires_grad=False,
            )
            for p in weights
        ]
    )


class ClearSums(nn.Cell):
    """Sets sums of gradients back to zero."""

    def __init__(self, sums: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.sums = sums

    def construct(self) -> bool:
        """Clear all of them."""
        for value in self.sums:
            ops.assign(value, ops.zeros_like(value))
        return True
