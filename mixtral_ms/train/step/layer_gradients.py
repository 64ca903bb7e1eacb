"""A pipeline stage whose forward keeps every layer's input, and goes back layer by layer.

Nothing but a layer's input is needed to compute the layer again, so that the stage's forward runs
once, each layer once more just before its own backward, and of a micro batch under way there are a
tensor (B, S, D) a layer and what the routers decided.

Legend: B batch, S sequence, D hidden, L layers of the stage, T = B * S tokens, E experts.
"""

from collections.abc import Mapping

import mindspore
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.kernels.cells.experts import share_kept
from mixtral_ms.model.decoder_layer import DecoderLayer
from mixtral_ms.model.mixtral import MixtralForCausalLM, MixtralModel, TokenEmbedding
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import ProcessGroup
from mixtral_ms.train.objectives.objective import Objective
from mixtral_ms.train.step.gradients import GradientSums

_ROUTINGS = 4
"""Tensors that `RouterLosses` reads, of all layers."""


def kept_like(network: MixtralForCausalLM, hidden_BSD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Zeros of the types and shapes of what `LayersForward` keeps of such a batch."""
    layers, experts = len(network.model.layers), network.config.moe_config.expert_num
    scores_LTE = ops.zeros((layers, batch.input_ids.size, experts), mstype.float32)
    counts_LE = ops.zeros((layers, experts), mstype.int32)
    return (*[hidden_BSD] * (layers - 1), scores_LTE, scores_LTE, counts_LE, counts_LE)


class LayersForward(nn.Cell):
    """The next stage's input, and what the backward reads: layers' inputs but the first, routings.

    Args:
        objective: of a stage that is not the last.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.model: MixtralModel = objective.network.model

    def construct(
        self,
        hidden_BSD: Tensor,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None,
        positions_BS: Tensor | None,
        *fields: Tensor,
    ) -> tuple:
        """Of what `Objective.stage_parts` takes."""
        x = self.model.stage_input(input_ids_BS, hidden_BSD)
        valid_T = self.model.valid_tokens(input_ids_BS)
        inputs, x, routings = self.model.through_layers(x, valid_T, segment_ids_BS, positions_BS)
        return (x, *inputs[1:], *routings)


class LayersBackward(nn.Cell):
    """Parts of the loss, the gradient of the stage's input; adds weights' gradients to sums.

    Args:
        objective: of a stage that is not the last.
        shards: as `GradientSums` takes them.
    """

    def __init__(self, objective: Objective, shards: Mapping[str, ProcessGroup]) -> None:
        super().__init__(auto_prefix=False)
        network = objective.network
        self.model: MixtralModel = network.model
        self.is_first_stage = network.mesh.is_first_stage
        self.embedding = None
        embedded = self.model.tok_embeddings.trainable_params() if self.is_first_stage else []
        if embedded:
            self.embedding = _EmbeddingGradient(self.model.tok_embeddings)
        self.layers = nn.CellList(
            [_LayerGradient(layer, self.model) for layer in self.model.layers], auto_prefix=False
        )
        share_kept([layer.feed_forward.routed_experts.experts for layer in self.model.layers])
        self.losses = mindspore.value_and_grad(_RouterParts(objective), (0, 1), has_aux=True)
        self.kept = len(self.layers) - 1 + _ROUTINGS
        self.sums = GradientSums(ParameterTuple(network.trainable_params()), shards)

    def construct(
        self,
        hidden_BSD: Tensor,
        dy_BSD: Tensor,
        per_target: Tensor,
        per_micro: Tensor,
        *inputs: Tensor | None,
    ) -> tuple:
        """Of what `LayersForward` kept, then of what `Objective.stage_parts` takes."""
        kept, of_batch = inputs[: self.kept], inputs[self.kept :]
        input_ids_BS, positions_BS = of_batch[0], of_batch[2]
        valid_T, packed = self.model.valid_tokens(input_ids_BS), self.model.prepared(of_batch[1])
        last = len(self.layers) - 1
        outputs, of_routers = self.losses(*kept[last:], valid_T, per_target, per_micro)
        inputs_L = (self.model.stage_input(input_ids_BS, hidden_BSD), *kept[:last])
        gradients: tuple[Tensor, ...] = ()
        for i in range(last + 1):
            layer = last - i
            of_routing = of_routers[0][layer], of_routers[1][layer]
            dy_BSD, own = self.layers[layer](
                inputs_L[layer], dy_BSD, *of_routing, valid_T, positions_BS, packed
            )
            gradients = own + gradients
        if self.embedding is not None:
            gradients = self.embedding(input_ids_BS, dy_BSD) + gradients
        self.sums(gradients)
        return outputs[1:], hidden_BSD if self.is_first_stage else dy_BSD


class _LayerGradient(nn.Cell):
    """A layer computed again, and its gradients."""

    def __init__(self, layer: DecoderLayer, model: MixtralModel) -> None:
        super().__init__(auto_prefix=False)
        weights = ParameterTuple(layer.trainable_params())
        self.differentiate = mindspore.grad(_LayerScalar(layer, model), 0, weights)

    def construct(self, x_BSD: Tensor, dy_BSD: Tensor, *inputs: Tensor | None) -> tuple:
        """Returns those of its input and of its weights; of what `_LayerScalar` takes."""
        # not before the layer behind has gone back: one layer's activations are there at a time
        return self.differentiate(ops.depend(x_BSD, dy_BSD), dy_BSD, *inputs)


class _LayerScalar(nn.Cell):
    """A scalar of a layer's outputs that has given gradients."""

    def __init__(self, layer: DecoderLayer, model: MixtralModel) -> None:
        super().__init__(auto_prefix=False)
        self.layer, self.cos, self.sin = layer, model.cos, model.sin
        self.with_gradient = _WithGradient()

    def construct(  # noqa: PLR0913, PLR0917 - a layer's inputs, its outputs' gradients
        self,
        x_BSD: Tensor,
        dy_BSD: Tensor,
        d_probs_TE: Tensor,
        d_logits_TE: Tensor,
        valid_T: Tensor,
        positions_BS: Tensor | None,
        packed: Tensor | None,
    ) -> Tensor:
        y, routing = self.layer(x_BSD, valid_T, self.cos, self.sin, positions_BS, packed)
        of_routing = self.with_gradient(routing[0], d_probs_TE) + self.with_gradient(
            routing[1], d_logits_TE
        )
        return self.with_gradient(y, dy_BSD) + of_routing


class _EmbeddingGradient(nn.Cell):
    """The gradients of the embedding's weights."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__(auto_prefix=False)
        weights = ParameterTuple(embedding.trainable_params())
        self.differentiate = mindspore.grad(_EmbeddingScalar(embedding), None, weights)

    def construct(self, input_ids_BS: Tensor, dx_BSD: Tensor) -> tuple:
        """Of the gradient of what it gave."""
        return self.differentiate(input_ids_BS, dx_BSD)


class _EmbeddingScalar(nn.Cell):
    """A scalar of the embedding's rows that has a given gradient."""

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__(auto_prefix=False)
        self.embedding, self.with_gradient = embedding, _WithGradient()

    def construct(self, input_ids_BS: Tensor, dx_BSD: Tensor) -> Tensor:
        return self.with_gradient(self.embedding(input_ids_BS), dx_BSD)


class _WithGradient(nn.Cell):
    """Some scalar of x, which nobody reads, whose gradient is dx."""

    def construct(self, x: Tensor, dx: Tensor) -> Tensor:
        return ops.cast(ops.reshape(x, (-1,))[0], mstype.float32)

    def bprop(self, x: Tensor, dx: Tensor, out: Tensor, dout: Tensor) -> tuple:
        return dx, zeros_like(dx)


class _RouterParts(nn.Cell):
    """The scalar whose gradient a micro batch adds, without what the next stages add; all parts."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective, self.losses = objective, objective.network.model.router_losses

    def construct(  # noqa: PLR0913, PLR0917 - what the losses read, and weights
        self,
        probs_LTE: Tensor,
        logits_LTE: Tensor,
        tokens_per_expert_LE: Tensor,
        kept_tokens_per_expert_LE: Tensor,
        valid_T: Tensor,
        per_target: Tensor,
        per_micro: Tensor,
    ) -> tuple:
        router = self.losses(
            probs_LTE, logits_LTE, tokens_per_expert_LE, kept_tokens_per_expert_LE, valid_T
        )
        parts = (Tensor(0.0, mstype.float32),) * self.objective.part_count + router
        return (self.objective.weigh(parts, per_target, per_micro), *parts)
