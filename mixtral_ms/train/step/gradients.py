"""Gradient accumulation over the micro batches of one step, as compiled graphs.

Legend: B batch, S sequence, L layers, E experts.
"""

from collections.abc import Callable

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import compile_together


class MicroBatchGradients:
    """Forward and backward of every micro batch of a step, on a network without pipeline stages.

    Args:
        network: the model, its shapes those of one micro batch.
        accumulation: micro batches a step.
    """

    def __init__(self, network: MixtralForCausalLM, accumulation: int) -> None:
        self.graph = _Gradients(network, add=accumulation > 1)
        self._sums, self._mesh, self._compiled = self.graph.sums, network.mesh, False

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
        if self._sums:
            self._sums.clear()  # not after the step: the diagnosis of a skipped one reads the sums
        outputs, gradients = [], ()
        weights = [Tensor(weight, mstype.float32) for weight in (per_token, per_micro)]
        for index, batch in enumerate(micro_batches):
            before(index)
            ids, labels = Tensor(batch.input_ids), Tensor(batch.labels)
            inputs = (ids, labels, *weights, *segment_tensors(batch))
            if not self._compiled:
                compile_together(self._mesh, {self.graph: inputs})
                self._compiled = True
            parts, gradients = self.graph(*inputs)
            outputs.append(parts)
        return outputs, tuple(self._sums.values) if self._sums else gradients


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
    """Loss parts of one micro batch, and its gradients where they are not added to sums."""

    def __init__(self, network: MixtralForCausalLM, *, add: bool) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(network.trainable_params())
        self.sums = GradientSums(self.weights) if add else None
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
        if self.sums is None:
            return outputs[1:], gradients
        self.sums(gradients)
        return outputs[1:], ()


class GradientSums(nn.Cell):
    """Gradient accumulation: of each parameter the sum so far, added to inside a graph."""

    def __init__(self, weights: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.values = ParameterTuple(
            [
                Parameter(
                    Tensor.from_numpy(np.zeros(p.shape, np.float32)),
                    f"grad_sum.{p.name}",
                    requires_grad=False,
                )
                for p in weights
            ]
        )

    def clear(self) -> None:
        """Set all of them to zero."""
        for value in self.values:
            ops.assign(value, ops.zeros_like(value))

    def construct(self, gradients: tuple) -> bool:
        """Add those of one micro batch, which need no memory behind that.

        The last layers' come first, as they do from the backward pass: in another order each would
        wait for those before it, and all of them stand beside the sums.
        """
        count = len(self.values)
        for i in range(count):
            ops.assign_add(self.values[count - 1 - i], gradients[count - 1 - i])
        return True
