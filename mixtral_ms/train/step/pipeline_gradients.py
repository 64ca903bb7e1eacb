"""Gradient accumulation over the micro batches that go through the pipeline stages.

A stage is compiled twice: forwards, and backwards with what is computed again in it. Of a micro
batch under way the layers' inputs are kept (layer_gradients.py), or the stage's input alone. The
last stage needs the second graph alone.

Legend: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Mapping

import mindspore
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.pipeline_stages import keeps_layer_inputs
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.model.nn.compute_dtype import compute_type
from mixtral_ms.parallel.comm.process_groups import compile_together, send_recv
from mixtral_ms.parallel.grid.mesh import ProcessGroup
from mixtral_ms.parallel.pipeline_schedule import Compute, SendRecv, one_forward_one_backward
from mixtral_ms.train.objectives.objective import Objective, batch_tensors
from mixtral_ms.train.step.gradients import GradientSums, Graphs
from mixtral_ms.train.step.layer_gradients import LayersBackward, LayersForward, kept_like


class Neighbours:
    """What a stage and the ones beside it give each other: hidden states and their gradients.

    Args:
        network: the stage's.
        batch: one of the shape that this rank always has.
    """

    def __init__(self, network: MixtralForCausalLM, batch: Batch) -> None:
        self.mesh, config = network.mesh, network.config
        sequences, length = batch.input_ids.shape
        if self.mesh.grid.use_seq_parallel:
            length //= self.mesh.grid.model_parallel
        dtype = compute_type(config.residual_dtype or config.compute_dtype)
        self._shape, self._dtype = (sequences, length, config.hidden_size), dtype

    def empty(self) -> Tensor:
        """Zeros, as large as what goes from stage to stage."""
        return ops.zeros(self._shape, self._dtype)

    def send_recv(self, stage: int, sent: Tensor | None, *, receive: bool) -> Tensor | None:
        """Send to and receive from a neighbour; returns what it sends."""
        pair = self.mesh.pair(self.mesh.beside(stage))
        empty = self.empty() if receive else None
        return send_recv(pair, sent, empty)

    def empty_input(self) -> Tensor:
        """Zeros in place of what the stage before sends."""
        return self.empty() if self.mesh.stage > 0 else _NOTHING

    def input_of_stage(self) -> Tensor:
        """What the stage before sends; the first stage gets a number that it does not read."""
        stage = self.mesh.stage
        return self.send_recv(stage - 1, None, receive=True) if stage > 0 else _NOTHING

    def pass_on(self, hidden_BSD: Tensor) -> None:
        """Send the stage's output to the next one, if there is one."""
        if not self.mesh.is_last_stage:
            self.send_recv(self.mesh.stage + 1, hidden_BSD, receive=False)


class PipelineGradients:
    """As `MicroBatchGradients`, on a network with pipeline stages."""

    def __init__(
        self, objective: Objective, accumulation: int, shards: Mapping[str, ProcessGroup]
    ) -> None:
        self.objective, mesh = objective, objective.network.mesh
        self._actions = one_forward_one_backward(mesh.stage, mesh.grid.pipeline_stage, accumulation)
        self._forward: nn.Cell | None = None
        self._backward: _StageBackward | LayersBackward
        if keeps_layer_inputs(mesh.grid, mesh.stage):
            self._forward = LayersForward(objective)
            self._backward = LayersBackward(objective, shards)
        else:
            self._forward = None if mesh.is_last_stage else _StageForward(objective)
            self._backward = _StageBackward(objective, shards)
        self._sums, self._compiled = self._backward.sums, False

    def graphs(self, batch: Batch) -> Graphs:
        """As `MicroBatchGradients.graphs`; before the last stage the forward too."""
        network, weight = self.objective.network, Tensor(1.0, mstype.float32)
        neighbours = Neighbours(network, batch)
        hidden = neighbours.empty_input()
        dy = _NOTHING if network.mesh.is_last_stage else neighbours.empty()
        inputs = batch_tensors(self.objective, batch)
        kept: tuple[Tensor, ...] = ()
        if isinstance(self._backward, LayersBackward):
            kept = kept_like(network, dy, batch)
        found: Graphs = {self._backward: (hidden, dy, weight, weight, *kept, *inputs)}
        if self._forward is not None:
            found[self._forward] = (hidden, *inputs)
        return found

    def __call__(
        self,
        micro_batches: list[Batch],
        weights: tuple[Tensor, Tensor],
        before: Callable[[int], None],
    ) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """Run all of them.

        Args:
            micro_batches: this rank's, the same on all stages.
            weights: of the objective's sums in what is differentiated, and of the routers' losses.
            before: called with a micro batch's number whenever it is to be computed.

        Returns:
            For each micro batch the objective's parts, of this stage's layers, and the sums of the
            gradients of this stage's parameters.
        """
        self._sums.clear()  # not after the step: the diagnosis of a skipped one reads the sums
        step = _Step(self.objective, micro_batches)
        if not self._compiled:
            compile_together(self.objective.network.mesh, self.graphs(micro_batches[0]))
            self._compiled = True
        for action in self._actions:
            if isinstance(action, SendRecv):
                step.send_recv(action)
            elif action.backward:
                before(action.micro)
                step.backward(action, self._backward, weights)
            elif self._forward:
                before(action.micro)
                step.forward(action, self._forward)
        return step.outputs, tuple(self._sums.values)


class _Step:
    """Tensors of the micro batches that are under way."""

    def __init__(self, objective: Objective, micro_batches: list[Batch]) -> None:
        self.objective, self.stage = objective, objective.network.mesh.stage
        self.neighbours = Neighbours(objective.network, micro_batches[0])
        self.micro_batches = micro_batches
        self.outputs: list[tuple[Tensor, ...]] = []
        self.inputs: dict[int, Tensor] = {}
        self.kept: dict[int, list[Tensor]] = {}
        self.to_send: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def send_recv(self, action: SendRecv) -> None:
        sent = None if action.send is None else self.to_send.pop(action.send)
        number = action.receive
        received = self.neighbours.send_recv(action.stage, sent, receive=number is not None)
        if number is not None:
            kept = self.inputs if action.stage < self.stage else self.gradients
            kept[number] = received

    def forward(self, action: Compute, cell: nn.Cell) -> None:
        hidden_BSD = self.inputs.get(action.micro, _NOTHING)
        tensors = self._tensors(action.micro)
        self.to_send[action.micro], *self.kept[action.micro] = cell(hidden_BSD, *tensors)

    def backward(self, action: Compute, cell: nn.Cell, weights: tuple[Tensor, Tensor]) -> None:
        hidden_BSD = self.inputs.pop(action.micro, _NOTHING)
        dy_BSD = self.gradients.pop(action.micro, _NOTHING)
        tensors = (*self.kept.pop(action.micro, ()), *self._tensors(action.micro))
        parts, dx_BSD = cell(hidden_BSD, dy_BSD, *weights, *tensors)
        self.outputs.append(parts)
        if self.stage > 0:
            self.to_send[action.micro] = dx_BSD

    def _tensors(self, micro: int) -> tuple[Tensor | None, ...]:
        return batch_tensors(self.objective, self.micro_batches[micro])


class _StageForward(nn.Cell):
    """The next stage's input."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(self, *inputs: Tensor | None) -> tuple[Tensor]:
        """Of what `Objective.stage_parts` takes."""
        return (self.objective.stage_parts(*inputs)[0],)


class _StageBackward(nn.Cell):
    """Parts of the loss, the gradient of the stage's input; adds weights' gradients to sums."""

    def __init__(self, objective: Objective, shards: Mapping[str, ProcessGroup]) -> None:
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(objective.network.trainable_params())
        self.sums = GradientSums(self.weights, shards)
        self.is_first_stage = objective.network.mesh.is_first_stage
        self.differentiate = mindspore.value_and_grad(
            objective, None if self.is_first_stage else 0, self.weights, has_aux=True
        )

    def construct(self, hidden_BSD: Tensor, *inputs: Tensor | None) -> tuple:
        """Of what `Objective.construct` takes."""
        outputs, gradients = self.differentiate(hidden_BSD, *inputs)
        dx_BSD = hidden_BSD
        if not self.is_first_stage:
            dx_BSD, gradients = gradients
        self.sums(gradients)
        return outputs[1:], dx_BSD


_NOTHING = Tensor(np.zeros(1, np.float32))
"""Stands where a tensor is not read: the first stage's input, the last one's gradient."""
