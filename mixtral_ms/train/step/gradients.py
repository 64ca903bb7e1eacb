"""Gradient accumulation over the micro batches of one step, as compiled graphs.

Legend: B batch, S sequence, L layers, E experts.
"""

from collections.abc import Callable, Mapping

import mindspore
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.comm.process_groups import compile_together
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup
from mixtral_ms.train.objectives.objective import Objective, batch_tensors

Graphs = dict[nn.Cell, tuple[Tensor | None, ...]]
"""Cells in the order in which they are compiled, each with inputs of the shapes that it gets."""


class MicroBatchGradients:
    """Forward and backward of every micro batch of a step, on a network without pipeline stages.

    Args:
        objective: of the model, whose shapes are those of one micro batch.
        accumulation: micro batches a step.
        shards: see `GradientSums`.
    """

    def __init__(
        self, objective: Objective, accumulation: int, shards: Mapping[str, ProcessGroup]
    ) -> None:
        self.objective = objective
        self.graph = _Gradients(objective, add=accumulation > 1 or bool(shards), shards=shards)
        self._sums, self._compiled = self.graph.sums, False

    def graphs(self, batch: Batch) -> Graphs:
        """What is compiled for micro batches like this one, with inputs like theirs."""
        weight = Tensor(1.0, mstype.float32)
        return {self.graph: (weight, weight, *batch_tensors(self.objective, batch))}

    def __call__(
        self,
        micro_batches: list[Batch],
        weights: tuple[Tensor, Tensor],
        before: Callable[[int], None],
    ) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Run all of them.

        Args:
            micro_batches: as many as `accumulation`.
            weights: of the objective's sums in what is differentiated, and of the routers' losses.
            before: called with the number of each micro batch, from 0.

        Returns:
            For each micro batch the objective's parts, and the gradients' sums over all of them.
        """
        if self._sums:
            self._sums.clear()  # not after the step: the diagnosis of a skipped one reads the sums
        outputs, gradients = [], ()
        for index, batch in enumerate(micro_batches):
            before(index)
            inputs = (*weights, *batch_tensors(self.objective, batch))
            if not self._compiled:
                compile_together(self.objective.network.mesh, self.graphs(batch))
                self._compiled = True
            parts, gradients = self.graph(*inputs)
            outputs.append(parts)
        return outputs, tuple(self._sums.values) if self._sums else gradients


class _Gradients(nn.Cell):
    """Parts of one micro batch's loss, and its gradients where they are not added to sums."""

    def __init__(
        self, objective: Objective, *, add: bool, shards: Mapping[str, ProcessGroup]
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(objective.network.trainable_params())
        self.sums = GradientSums(self.weights, shards) if add else None
        self.narrow = _narrow(self.weights)
        self.differentiate = mindspore.value_and_grad(objective, None, self.weights, has_aux=True)

    def construct(self, *inputs: Tensor | None) -> tuple:
        """Of what `Objective.construct` takes behind the neighbouring stages' tensors."""
        outputs, gradients = self.differentiate(None, None, *inputs)
        if self.sums is None:
            if self.narrow:
                wide: tuple[Tensor, ...] = ()
                for i in range(len(self.weights)):
                    wide += (ops.cast(gradients[i], mstype.float32),)
                gradients = wide
            return outputs[1:], gradients
        self.sums(gradients)
        return outputs[1:], ()


class GradientSums(nn.Cell):
    """Gradient accumulation: of each parameter the sum so far, added to inside a graph.

    Args:
        weights: whose gradients they are.
        shards: by name, the ranks that first add a gradient and then have a part each of it
            (ZeRO-2, section 5.2 of arXiv 1910.02054). The sum is of the own part.
    """

    def __init__(self, weights: ParameterTuple, shards: Mapping[str, ProcessGroup]) -> None:
        super().__init__(auto_prefix=False)
        groups = [shards.get(p.name, ALONE) for p in weights]
        self.values = ParameterTuple(
            [_zero_sum(p, group.size) for p, group in zip(weights, groups, strict=True)]
        )
        self.narrow, self.cuts = _narrow(weights), bool(shards)
        if self.cuts:
            self.own_parts = nn.CellList([_OwnPart(group) for group in groups])

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
            gradient = gradients[count - 1 - i]
            if self.narrow:
                gradient = ops.cast(gradient, mstype.float32)
            if self.cuts:
                gradient = self.own_parts[count - 1 - i](gradient)
            ops.assign_add(self.values[count - 1 - i], gradient)
        return True


class _OwnPart(nn.Cell):
    """Of the ranks' gradients the sum, of which each has a part along axis 0."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.ranks = group.size
        self.scatter = transports.reduce_scatter(group) if self.ranks > 1 else None

    def construct(self, gradient: Tensor) -> Tensor:
        if self.scatter is None:
            return gradient
        rows = gradient.shape[0] // self.ranks
        return self.scatter(ops.reshape(gradient, (self.ranks, rows) + gradient.shape[1:]))


def _zero_sum(weight: Parameter, parts: int) -> Parameter:
    first, *others = weight.shape
    return zero_parameter(f"grad_sum.{weight.name}", first // parts, *others, requires_grad=False)


def _narrow(weights: ParameterTuple) -> bool:
    """Whether some are working weights, of fewer bits: gradients are added in float32."""
    return any(one.dtype != mstype.float32 for one in weights)
