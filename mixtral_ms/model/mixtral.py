"""Mixtral for causal language modelling.

Each rank holds the layers of its pipeline stage, and of each tensor what sharding_rules.py says.

Legend: B batch, S sequence (with context parallel: this rank's part), T = B * S tokens, D hidden,
V vocabulary, L layers of the stage, E experts.
"""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.parameter_table import LAYER, layer_of
from mixtral_ms.config.derived.pipeline_stages import stage_layers
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.cells.elementwise import rotary_tables
from mixtral_ms.kernels.cells.experts import share_kept
from mixtral_ms.kernels.kernel_choice import FusedOperators, KernelChoice
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.model.decoder_layer import DecoderLayer, RMSNorm, attention_sizes
from mixtral_ms.model.lora import add_adapters, freeze_weights
from mixtral_ms.model.moe.router import RouterLosses
from mixtral_ms.model.nn.compute_dtype import compute_type
from mixtral_ms.model.nn.linear import Linear
from mixtral_ms.model.nn.weight_init import initialize
from mixtral_ms.parallel.comm.collectives import (
    EnterSplit,
    GatherFromRanks,
    LeaveSplit,
    SplitToRanks,
)
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes


class TokenEmbedding(nn.Cell):
    """Rows of a (V, D) table, or of this rank's part of it.

    Args:
        vocab_size: V.
        hidden_size: D.
        mesh: the ranks.
        dtype: of the result.
    """

    def __init__(self, vocab_size: int, hidden_size: int, mesh: Mesh, dtype: mstype.Type) -> None:
        super().__init__()
        self.dtype, self.first, self.ids = dtype, 0, vocab_size
        ranks, sequence = mesh.tensor, mesh.grid.use_seq_parallel
        self.join = None
        self.split_vocabulary = ranks.size > 1 and not mesh.grid.vocab_emb_dp
        if self.split_vocabulary:
            self.ids = vocab_size // ranks.size
            self.first = ranks.index * self.ids
            self.join = LeaveSplit(ranks, sequence=sequence)
        elif ranks.size > 1 and sequence:
            self.join = SplitToRanks(ranks, 1)
        self.embedding_weight = zero_parameter("embedding_weight", self.ids, hidden_size)

    def construct(self, input_ids_BS: Tensor) -> Tensor:
        """Returns (B, S, D)."""
        if self.split_vocabulary:
            local = input_ids_BS - self.first
            inside = ops.logical_and(local >= 0, local < self.ids)
            x = ops.gather(self.embedding_weight, ops.where(inside, local, local * 0), 0)
            x = x * ops.cast(ops.expand_dims(inside, 2), x.dtype)
        else:
            x = ops.gather(self.embedding_weight, input_ids_BS, 0)
        x = ops.cast(x, self.dtype)
        return x if self.join is None else self.join(x)


class MixtralModel(nn.Cell):
    """Embedding, decoder layers and the final norm, of which a pipeline stage has its part."""

    def __init__(
        self,
        config: MixtralConfig,
        batch_size: int,
        seq_length: int,
        kernels: KernelChoice,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        dtype = compute_type(config.compute_dtype)
        self.pad_token_id = config.pad_token_id
        self.is_first_stage, is_last_stage = mesh.is_first_stage, mesh.is_last_stage
        self.tok_embeddings: nn.Cell = None  # on other stages nobody asks for it
        if self.is_first_stage or (is_last_stage and config.tie_word_embeddings):
            residual_dtype = compute_type(config.residual_dtype or config.compute_dtype)
            self.tok_embeddings = TokenEmbedding(
                config.vocab_size, config.hidden_size, mesh, residual_dtype
            )
        length = seq_length // mesh.context.size
        self.layers = nn.CellList(
            [
                DecoderLayer(config, number, batch_size, length, kernels, dtype, mesh)
                for number in stage_layers(config, mesh.grid.pipeline_stage, mesh.stage)
            ]
        )
        sizes = attention_sizes(config, length, mesh)
        self.packed_samples = kernels.packed_samples(batch_size, sizes, mesh.context)
        self.router_losses = RouterLosses(config.moe_config, mesh.context)
        self.norm_out = None
        if is_last_stage:
            self.norm_out = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        tables = rotary_tables(seq_length, config.head_dim, config.theta)
        rotary_dtype = compute_type(config.rotary_dtype)
        self.cos, self.sin = (Tensor(table).astype(rotary_dtype) for table in tables)

    def construct(
        self,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        hidden_BSD: Tensor | None = None,
    ) -> tuple:
        """Returns hidden (B, S, D), then per layer aux_L, z_L, load_LE, dropped_L, entropy_L.

        hidden_BSD is what the stage before gave; the first stage does not read it.
        """
        x, valid_T = self.stage_input(input_ids_BS, hidden_BSD), self.valid_tokens(input_ids_BS)
        _, x, routings = self.through_layers(x, valid_T, segment_ids_BS, positions_BS)
        if self.norm_out is not None:
            x = self.norm_out(x)
        return (x, *self.router_losses(*routings, valid_T))

    def stage_input(self, input_ids_BS: Tensor, hidden_BSD: Tensor | None) -> Tensor:
        """The first layer's input: what the stage before gave, or the embedding's rows."""
        return self.tok_embeddings(input_ids_BS) if self.is_first_stage else hidden_BSD

    def through_layers(
        self,
        x_BSD: Tensor,
        valid_T: Tensor,
        segment_ids_BS: Tensor | None,
        positions_BS: Tensor | None,
    ) -> tuple:
        """Returns the inputs of all layers, what the last one gives, and what the routers decided.

        The latter as `RouterLosses` takes it: probs_LTE, logits_LTE and the two counts.
        """
        packed = self.prepared(segment_ids_BS)
        inputs: tuple[Tensor, ...] = ()
        routings: tuple[tuple, ...] = ()
        for layer in self.layers:
            inputs += (x_BSD,)
            x_BSD, routing = layer(x_BSD, valid_T, self.cos, self.sin, positions_BS, packed)
            routings += (routing,)
        probs_L, logits_L, tokens_per_expert_L, kept_tokens_per_expert_L = zip(*routings)  # noqa: B905 - graph mode
        stacks = (
            ops.stack(probs_L),
            ops.stack(logits_L),
            ops.stack(tokens_per_expert_L),
            ops.stack(kept_tokens_per_expert_L),
        )
        return inputs, x_BSD, stacks

    def prepared(self, segment_ids_BS: Tensor | None) -> Tensor | None:
        """What attention is given of packed samples, made once for all layers."""
        if segment_ids_BS is None or self.packed_samples is None:
            return segment_ids_BS
        return self.packed_samples(segment_ids_BS)

    def valid_tokens(self, input_ids_BS: Tensor) -> Tensor:
        """The padding mask: which tokens (T) are not padding."""
        if self.pad_token_id >= 0:
            return ops.reshape(ops.not_equal(input_ids_BS, self.pad_token_id), (-1,))
        return ops.reshape(input_ids_BS >= 0, (-1,))


class MixtralForCausalLM(nn.Cell):
    """Mixtral with its language modelling head.

    Args:
        config: the network's configuration; `batch_size` and `seq_length` fix the graph's shapes
            unless given here.
        seed: seed of the initial weights; the same seed gives the same weights on every layout.
            None leaves all parameters zero, for a file's values or for `initialize`.
        backend: kernels to use, see `kernels.select_kernels`.
        share: another network, of the same sizes, whose parameters this one uses as its own.
        mesh: the ranks, of which each has its part of the network; one process has it whole.

    Source: arXiv 2401.04088; parameter names of MindFormers.
    """

    def __init__(
        self,
        config: MixtralConfig,
        *,
        seed: int | None = 0,
        batch_size: int | None = None,
        seq_length: int | None = None,
        backend: str = "auto",
        share: "MixtralForCausalLM | None" = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.mesh: Mesh = mesh or (share.mesh if share else Mesh())
        mesh = self.mesh
        self.ignore_token_id = config.ignore_token_id
        self.dtype = compute_type(config.compute_dtype)
        # of a part of the sequence an expert may have any number of tokens, up to its capacity
        dropless = config.moe_config.dropless or mesh.context.size > 1
        fused = FusedOperators(
            rotary=config.use_fused_rope,
            swiglu=config.use_fused_swiglu,
            norm_dtype=compute_type(config.layernorm_compute_type),
        )
        kernels = select_kernels(backend, dropless=dropless, dtype=self.dtype, fused=fused)
        self.model = MixtralModel(
            config, batch_size or config.batch_size, seq_length or config.seq_length, kernels, mesh
        )
        self.kernel_name = kernels.name
        self._add_head(kernels)
        layers = stage_layers(config, mesh.grid.pipeline_stage, mesh.stage)
        add_adapters(self.model.layers, config, kernels, layers.start)
        # MindSpore numbers cells by attribute path only when a graph is built: do it now, so that
        # names are right for checkpoints before the first step.
        for path, parameter in self.parameters_and_names():
            parameter.name = _global_name(path, layers.start)
        if share is not None:
            self._take_parameters(share)
        elif seed is not None:
            initialize(self, config, seed, mesh)
        if config.pet_config is not None:
            freeze_weights(self)

    def construct(
        self,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits: float32 scores (B, S, V) of the id that follows each position.

        Args:
            input_ids_BS: int32 ids; `pad_token_id` marks padding.
            segment_ids_BS: packed samples see only positions of their own segment. Where the
                kernels have `model.packed_samples`, what its `prepared` gives of segment ids.
            positions_BS: position of each token in its sample; None counts from 0.
        """
        hidden = self.model(input_ids_BS, segment_ids_BS, positions_BS)[0]
        return ops.cast(self.logits(hidden), mstype.float32)

    def summed_cross_entropy(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross entropy, summed over supervised tokens, of the last stage's hidden states.

        Args:
            hidden_BSD: what `model` gives.
            labels_BS: the id that follows each position; `ignore_token_id` where there is none.
        """
        if self.enter_head is not None:
            hidden_BSD = self.enter_head(hidden_BSD)
        hidden_TD = ops.reshape(hidden_BSD, (-1, hidden_BSD.shape[-1]))
        return self.cross_entropy(
            ops.cast(hidden_TD, self.dtype),
            ops.cast(self.head_weight(), self.dtype),
            self.target_ids(labels_BS),
        )

    def target_ids(self, labels_BS: Tensor) -> Tensor:
        """The labels (T), negative where a token is not supervised."""
        labels_T = ops.reshape(labels_BS, (-1,))
        return ops.where(
            ops.equal(labels_T, self.ignore_token_id), Tensor(-1, mstype.int32), labels_T
        )

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores over the whole vocabulary, in the compute dtype."""
        if self.enter_head is not None:
            hidden_BSD = self.enter_head(hidden_BSD)
        flat = ops.reshape(ops.cast(hidden_BSD, self.dtype), (-1, hidden_BSD.shape[-1]))
        scores = self.head_product(flat, ops.cast(self.head_weight(), self.dtype))
        if self.whole_vocabulary is not None:
            scores = self.whole_vocabulary(scores)
        return ops.reshape(scores, hidden_BSD.shape[:-1] + (self.config.vocab_size,))

    def head_weight(self) -> Tensor:
        """The (V, D) weight of the head, or this rank's rows of it; the embedding when tied."""
        if self.lm_head is not None:
            return self.lm_head.weight
        weight = self.model.tok_embeddings.embedding_weight
        return weight if self.own_rows is None else self.own_rows(weight)

    def _add_head(self, kernels: KernelChoice) -> None:
        """The head of the last stage; tensor-parallel ranks have a part of the vocabulary each."""
        config, mesh, ranks = self.config, self.mesh, self.mesh.tensor
        self.is_last_stage = mesh.is_last_stage
        self.lm_head = self.enter_head = self.whole_vocabulary = self.own_rows = None
        if not self.is_last_stage:
            return
        if not config.tie_word_embeddings:
            own_ids = config.vocab_size // ranks.size
            self.lm_head = Linear(config.hidden_size, own_ids, compute_dtype=self.dtype)
        # A frozen head has no gradient, and one that is cast is computed.
        stored = config.pet_config is None and self.dtype == mstype.float32
        weight = self.head_weight if stored else None
        self.cross_entropy = kernels.cross_entropy(ranks, weight)
        self.head_product = ops.MatMul(transpose_b=True)
        if ranks.size > 1:
            self.enter_head = EnterSplit(ranks, sequence=mesh.grid.use_seq_parallel)
            self.whole_vocabulary = GatherFromRanks(ranks, 1, partial=False)
            if config.tie_word_embeddings and mesh.grid.vocab_emb_dp:
                self.own_rows = SplitToRanks(ranks, 0)

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
        share_kept([layer.feed_forward.routed_experts.experts for layer in self.model.layers])

    def recompute_attention(self, layers: int) -> None:
        """Compute attention and norms of the first layers again, and keep what experts computed."""
        for number, layer in enumerate(self.model.layers):
            if number < layers:
                layer.attention_norm.recompute()
                layer.attention.recompute()
                layer.ffn_norm.recompute()


def _global_name(path: str, first_layer: int) -> str:
    """A parameter's name by its path, in which the layers of a stage are counted from 0."""
    layer = layer_of(path)
    if layer is None:
        return path
    inside = path.removeprefix(LAYER.format(layer=layer))
    return LAYER.format(layer=layer + first_layer) + inside
