"""Mixtral for causal language modelling.

Legend: B batch, S sequence, T = B * S tokens, D hidden, V vocabulary, L layers, E experts.
"""

import mindspore
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.kernels.elementwise import rotary_tables
from mixtral_ms.kernels.select import KernelChoice, select_kernels
from mixtral_ms.model.dtypes import compute_type
from mixtral_ms.model.initialize import initialize
from mixtral_ms.model.layers import DecoderLayer, RMSNorm
from mixtral_ms.model.linear import Linear, empty_parameter
from mixtral_ms.model.lora import add_adapters, freeze_weights
from mixtral_ms.parallel.layout import parameter_shapes


class TokenEmbedding(nn.Cell):
    """Rows of a (V, D) table."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_weight = empty_parameter("embedding_weight", vocab_size, hidden_size)

    def construct(self, input_ids_BS: Tensor) -> Tensor:
        """Returns (B, S, D)."""
        return ops.gather(self.embedding_weight, input_ids_BS, 0)


class MixtralModel(nn.Cell):
    """Embedding, decoder layers and the final norm."""

    def __init__(
        self, config: MixtralConfig, batch_size: int, seq_length: int, kernels: KernelChoice
    ) -> None:
        super().__init__()
        dtype = compute_type(config.compute_dtype)
        self.pad_token_id = config.pad_token_id
        self.residual_dtype = compute_type(config.residual_dtype or config.compute_dtype)
        self.seq_length = seq_length
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.CellList(
            [
                DecoderLayer(config, i, batch_size, seq_length, kernels, dtype)
                for i in range(config.num_layers)
            ]
        )
        self.norm_out = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        tables = rotary_tables(seq_length, config.head_dim, config.theta)
        rotary_dtype = compute_type(config.rotary_dtype)
        self.cos, self.sin = (Tensor(table).astype(rotary_dtype) for table in tables)

    def construct(
        self,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        """Returns hidden (B, S, D), then per layer aux_L, z_L, load_LE, dropped_L, entropy_L."""
        x, valid_T = self.embed(input_ids_BS)
        collected = ((), (), (), (), ())
        for layer in self.layers:
            x, *router = layer(x, valid_T, self.cos, self.sin, positions_BS, segment_ids_BS)
            collected = tuple(
                collected[i] + (router[i],)
                for i in range(5)  # noqa: RUF005 - graph mode
            )
        return (self.norm_out(x), *[ops.stack(values) for values in collected])

    def embed(self, input_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input: x (B, S, D), and which tokens (T) are not padding."""
        if self.pad_token_id >= 0:
            valid_T = ops.reshape(ops.not_equal(input_ids_BS, self.pad_token_id), (-1,))
        else:
            valid_T = ops.reshape(input_ids_BS >= 0, (-1,))
        x = ops.cast(self.tok_embeddings(input_ids_BS), self.residual_dtype)
        return x, valid_T


class MixtralForCausalLM(nn.Cell):
    """Mixtral with its language modelling head.

    Args:
        config: the network's configuration; `batch_size` and `seq_length` fix the graph's shapes
            unless given here.
        seed: seed of the initial weights; the same seed gives the same weights on every layout.
        backend: kernels to use, see `kernels.select_kernels`; None chooses by device_target.
        share: another network, of the same sizes, whose parameters this one uses as its own.

    Source: arXiv 2401.04088; parameter names of MindFormers.
    """

    def __init__(
        self,
        config: MixtralConfig,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        seq_length: int | None = None,
        backend: str | None = None,
        share: "MixtralForCausalLM | None" = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ignore_token_id = config.ignore_token_id
        self.dtype = compute_type(config.compute_dtype)
        if backend is None:
            backend = "cpu" if mindspore.get_context("device_target") == "CPU" else "ascend"
        kernels = select_kernels(backend, dropless=config.moe_config.dropless, dtype=self.dtype)
        self.model = MixtralModel(
            config, batch_size or config.batch_size, seq_length or config.seq_length, kernels
        )
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, compute_dtype=self.dtype)
        self.kernel_name = kernels.name
        if config.pet_config is not None:
            add_adapters(self.model.layers, config, kernels.name)
        self.cross_entropy = kernels.cross_entropy()
        # MindSpore numbers cells by attribute path only when a graph is built: do it now, so that
        # names are right for checkpoints before the first step.
        for name, parameter in self.parameters_and_names():
            parameter.name = name
        if share is None:
            initialize(self, config, seed)
        else:
            self._take_parameters(share)
        if config.pet_config is not None:
            freeze_weights(self)

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor | tuple:
        """Logits, or with labels the loss and its parts.

        Args:
            input_ids_BS: int32 ids; `pad_token_id` marks padding.
            labels_BS: the id that follows each position; `ignore_token_id` where there is none.
            segment_ids_BS: packed samples see only positions of their own segment.
            positions_BS: position of each token in its sample; None counts from 0.

        Returns:
            Without labels, float32 logits (B, S, V). With labels the tuple of `loss_parts`, led
            by the loss: mean cross entropy over supervised tokens plus aux and z losses.
        """
        if labels_BS is None:
            hidden = self.model(input_ids_BS, segment_ids_BS, positions_BS)[0]
            return ops.cast(self.logits(hidden), mstype.float32)
        parts = self.loss_parts(input_ids_BS, labels_BS, segment_ids_BS, positions_BS)
        lm_sum, tokens, aux_L, z_L = parts[:4]
        mean = lm_sum / ops.maximum(tokens, Tensor(1.0, mstype.float32))
        return (mean + ops.sum(aux_L) + ops.sum(z_L), *parts)

    def loss_parts(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        """Summed cross entropy, supervised tokens, aux_L, z_L, load_LE, dropped_L, entropy_L."""
        hidden, *router = self.model(input_ids_BS, segment_ids_BS, positions_BS)
        labels_T = ops.reshape(labels_BS, (-1,))
        labels_T = ops.where(
            ops.equal(labels_T, self.ignore_token_id), Tensor(-1, mstype.int32), labels_T
        )
        tokens = ops.sum(ops.cast(labels_T >= 0, mstype.float32))
        hidden_TD = ops.reshape(hidden, (-1, hidden.shape[-1]))
        lm_sum = self.cross_entropy(
            ops.cast(hidden_TD, self.dtype), ops.cast(self.head_weight(), self.dtype), labels_T
        )
        return (lm_sum, tokens, *router)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores over the vocabulary, in the compute dtype."""
        if self.lm_head is not None:
            return self.lm_head(hidden_BSD)
        flat = ops.reshape(ops.cast(hidden_BSD, self.dtype), (-1, hidden_BSD.shape[-1]))
        scores = ops.matmul(flat, ops.cast(self.head_weight(), self.dtype).T)
        return ops.reshape(scores, hidden_BSD.shape[:-1] + (self.config.vocab_size,))

    def head_weight(self) -> Tensor:
        """The (V, D) weight of the head: the embedding's when they are tied."""
        if self.lm_head is None:
            return self.model.tok_embeddings.embedding_weight
        return self.lm_head.weight

    def weights(self) -> list[Parameter]:
        """The parameters that weights of this network have values for, adapters left out."""
        shapes = parameter_shapes(self.config)
        return [one for one in self.get_parameters() if one.name in shapes]

    def _take_parameters(self, source: "MixtralForCausalLM") -> None:
        theirs = dict(source.parameters_and_names())
        for path, cell in self.cells_and_names():
            for attribute in list(cell._params):  # noqa: SLF001 - there is no public way
                setattr(cell, attribute, theirs[f"{path}.{attribute}"])

    def recompute_layers(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        for layer in self.model.layers:
            layer.recompute()
