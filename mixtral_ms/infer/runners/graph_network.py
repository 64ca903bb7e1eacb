"""The network with a KV cache, in MindSpore operators and with static shapes.

Over several ranks each has a part of the heads, of the experts and of the vocabulary, and the same
tokens as all others; what they add up is summed.

Legend: N sequences, t tokens of each, T = N * t tokens, D hidden, H heads, K kv heads, G heads per
kv head, d head_dim, S keys that a sequence may see, E experts, k experts a token, F intermediate,
P slots of the KV cache, V vocabulary.

Batch invariance. MindSpore's products on CPU are not the same bits for a token at another index, or
among another number of them. They are when the weight is the left operand, the tokens are the
columns of the right one, and there is always the same number of them. So products here are
weight @ x^T; a decoding step always has DECODE_TOKENS, padded where there are fewer. Batched
products (attention, experts), softmax and means were measured to be the same whatever stands beside
a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.parameter_row import ParameterRow
from mixtral_ms.config.derived.parameter_table import (
    ATTENTION_NORM,
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_GATE,
    EXPERT_UP,
    FFN_NORM,
    FINAL_NORM,
    KEY,
    LM_HEAD,
    OUTPUT,
    QUERY,
    ROUTER,
    VALUE,
    bias_of,
)
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.cells.elementwise import apply_rotary, swiglu
from mixtral_ms.kernels.kernel_choice import KernelChoice
from mixtral_ms.model.moe.router_policy import router_policy
from mixtral_ms.model.moe.token_dispatch import CombineTokens, Dispatch, PermuteTokens
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.grid.mesh import ALONE, Mesh, ProcessGroup

DECODE_TOKENS = 8
"""Tokens of a decoding step, and of a product with the head."""


class Weight(nn.Cell):
    """A tensor of `InferWeights`, as it is computed with."""

    def __init__(self, value: Parameter, scale: Parameter | None, dtype: mstype.Type) -> None:
        super().__init__(auto_prefix=False)
        self.value, self.scale, self.dtype = value, scale, dtype

    def construct(self) -> Tensor:
        """The values, times their rows' scales."""
        value = ops.cast(self.value, self.dtype)
        if self.scale is None:
            return value
        return value * ops.expand_dims(ops.cast(self.scale, self.dtype), -1)


@dataclass(frozen=True)
class SharedParameters:
    """What all compiled shapes have in common."""

    tensors: Mapping[str, Parameter]
    scales: Mapping[str, Parameter]
    keys: tuple[Parameter, ...]
    """The KV cache of each layer, here (P, K, d)."""
    values: tuple[Parameter, ...]
    mesh: Mesh = field(default_factory=Mesh)
    dtype: mstype.Type = mstype.float32
    """Of the products; the router's is float32."""
    tokens_are_columns: bool = True
    """Whether products are weight @ x^T, for batch invariance."""

    def weight(self, row: ParameterRow, layer: int = 0) -> Weight:
        """The cell of one tensor."""
        name = row.at(layer)
        dtype = mstype.float32 if row.always_float32 else self.dtype
        return Weight(self.tensors[name], self.scales.get(name), dtype)


class Projection(nn.Cell):
    """y = x W^T + b; `terms` are the ranks whose products are summed."""

    def __init__(
        self,
        shared: SharedParameters,
        row: ParameterRow,
        layer: int,
        terms: ProcessGroup = ALONE,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.sum = transports.all_reduce(terms) if terms.size > 1 else None
        self.weight, bias = shared.weight(row, layer), bias_of(row)
        self.bias = None
        if bias is not None and bias.at(layer) in shared.tensors:
            self.bias = shared.weight(bias, layer)
        self.product = ops.MatMul(transpose_b=True)
        self.tokens_are_columns = shared.tokens_are_columns

    def construct(self, x_TD: Tensor) -> Tensor:
        """Returns (T, outputs)."""
        if self.tokens_are_columns:
            y = ops.transpose(self.product(self.weight(), x_TD), (1, 0))
        else:
            y = self.product(x_TD, self.weight())
        if self.sum is not None:
            y = self.sum(y)
        return y if self.bias is None else y + ops.cast(self.bias(), y.dtype)


class CachedAttention(nn.Cell):
    """Writes keys and values to the KV cache and attends to all that a sequence may see."""

    def __init__(
        self, config: MixtralConfig, shared: SharedParameters, layer: int, sequences: int
    ) -> None:
        super().__init__(auto_prefix=False)
        ranks = shared.mesh.tensor
        self.wq, self.wk, self.wv = (Projection(shared, row, layer) for row in (QUERY, KEY, VALUE))
        self.wo = Projection(shared, OUTPUT, layer, ranks)
        self.keys, self.values = shared.keys[layer], shared.values[layer]
        self.sequences, self.head_dim = sequences, config.head_dim
        self.kv_heads = config.n_kv_heads // ranks.size
        self.groups = config.num_heads // config.n_kv_heads
        self.scale = 1.0 / float(np.sqrt(config.head_dim))
        self.write = ops.ScatterUpdate()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.weighted = ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def construct(
        self,
        x_TD: Tensor,
        cos_T1d: Tensor,
        sin_T1d: Tensor,
        cache_slots_T: Tensor,
        seen_NS: Tensor,
        mask_N1tS: Tensor,
    ) -> Tensor:
        """Returns (T, D)."""
        tokens, heads, groups = x_TD.shape[0], self.kv_heads, self.groups
        count, per = self.sequences, tokens // self.sequences
        q = ops.reshape(self.wq(x_TD), (tokens, heads * groups, self.head_dim))
        k = ops.reshape(self.wk(x_TD), (tokens, heads, self.head_dim))
        v = ops.reshape(self.wv(x_TD), (tokens, heads, self.head_dim))
        self.write(self.keys, cache_slots_T, apply_rotary(k, cos_T1d, sin_T1d))
        self.write(self.values, cache_slots_T, v)
        k_NKSd = ops.transpose(ops.gather(self.keys, seen_NS, 0), (0, 2, 1, 3))
        v_NKSd = ops.transpose(ops.gather(self.values, seen_NS, 0), (0, 2, 1, 3))
        q = apply_rotary(q, cos_T1d, sin_T1d) * self.scale
        q = ops.reshape(q, (count, per, heads, groups, self.head_dim))
        q = ops.reshape(
            ops.transpose(q, (0, 2, 3, 1, 4)), (count, heads, groups * per, self.head_dim)
        )
        scores = ops.reshape(self.scores(q, k_NKSd), (count, heads * groups, per, -1)) + mask_N1tS
        weights = ops.reshape(self.softmax(scores), (count, heads, groups * per, -1))
        out = ops.reshape(
            self.weighted(weights, v_NKSd), (count, heads, groups, per, self.head_dim)
        )
        out = ops.reshape(ops.transpose(out, (0, 3, 1, 2, 4)), (tokens, -1))
        return self.wo(out)


class Routing(nn.Cell):
    """`model.moe.router.Router` for inference: the same policy, the product of this file."""

    def __init__(self, config: MixtralConfig, shared: SharedParameters, layer: int) -> None:
        super().__init__(auto_prefix=False)
        self.dense = Projection(shared, ROUTER, layer)
        policy = router_policy(config.moe_config)
        self.score, self.choose = policy.scores(), policy.choice()

    def construct(self, x_TD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gates_Tk and expert_Tk (int32)."""
        logits_TE = self.dense(ops.cast(x_TD, mstype.float32))
        return self.choose(self.score(logits_TE), positions_T)


class _Experts(nn.Cell):
    """What both ways of computing the experts have."""

    def __init__(self, config: MixtralConfig, shared: SharedParameters, layer: int) -> None:
        super().__init__(auto_prefix=False)
        self.routing = Routing(config, shared, layer)
        self.w1, self.w2, self.w3 = (
            shared.weight(row, layer) for row in (EXPERT_GATE, EXPERT_DOWN, EXPERT_UP)
        )
        self.experts, self.dtype = config.moe_config.expert_num, shared.dtype
        mesh = shared.mesh
        count = self.experts // mesh.grid.expert_parallel
        self.first, self.end = mesh.expert_part * count, (mesh.expert_part + 1) * count
        ranks = mesh.expert_ranks
        self.sum = transports.all_reduce(ranks) if ranks.size > 1 else None

    def summed(self, y: Tensor) -> Tensor:
        """What the experts of all ranks add up to; gates are float32, and so is `y`."""
        y = ops.cast(y, self.dtype)
        return y if self.sum is None else self.sum(y)


class SparseExperts(_Experts):
    """For many tokens: each expert computes those that were sent to it; none is dropped."""

    def __init__(
        self, config: MixtralConfig, shared: SharedParameters, layer: int, kernels: KernelChoice
    ) -> None:
        super().__init__(config, shared, layer)
        self.network = kernels.experts()
        local_experts = range(self.first, self.end)
        self.dispatch = Dispatch(self.experts, None, False, self.network.layout, local_experts)
        self.permute = PermuteTokens(config.moe_config.num_experts_chosen)
        self.combine = CombineTokens(config.moe_config.num_experts_chosen)

    def construct(self, x_TD: Tensor, valid_T: Tensor, positions_T: Tensor) -> Tensor:
        """Returns (T, D); tokens that are not valid go to no expert."""
        gates_Tk, expert_Tk = self.routing(x_TD, positions_T)
        valid_Tk = ops.broadcast_to(ops.expand_dims(valid_T, 1), expert_Tk.shape)
        slot_Tk, not_dropped_Tk, assignment_R, tokens_per_local_expert_e, *_ = self.dispatch(
            expert_Tk, valid_Tk
        )
        gates_Tk = ops.where(not_dropped_Tk, gates_Tk, ops.zeros_like(gates_Tk))
        x_RD = self.permute(x_TD, assignment_R, slot_Tk, not_dropped_Tk)
        y_RD = self.network(x_RD, self.w1(), self.w3(), self.w2(), tokens_per_local_expert_e)
        return self.summed(self.combine(y_RD, gates_Tk, assignment_R, slot_Tk, not_dropped_Tk))


class DenseExperts(_Experts):
    """For the few tokens of a decoding step: every expert computes all of them.

    It costs no more memory traffic than gathering copies of the chosen experts' weights would.
    """

    def __init__(self, config: MixtralConfig, shared: SharedParameters, layer: int) -> None:
        super().__init__(config, shared, layer)
        self.into = ops.BatchMatMul(transpose_b=True)
        self.out = ops.BatchMatMul()

    def construct(self, x_TD: Tensor, valid_T: Tensor, positions_T: Tensor) -> Tensor:
        """Returns (T, D)."""
        tokens, hidden = x_TD.shape
        gates_Tk, expert_Tk = self.routing(x_TD, positions_T)
        ids_E = ops.arange(self.first, self.end, 1, dtype=mstype.int32)
        chosen_TkE = ops.equal(ops.expand_dims(expert_Tk, 2), ids_E)
        gates_TE = ops.sum(ops.cast(chosen_TkE, mstype.float32) * ops.expand_dims(gates_Tk, 2), 1)
        local_experts = self.end - self.first
        x_ETD = ops.broadcast_to(ops.expand_dims(x_TD, 0), (local_experts, tokens, hidden))
        act_EFT = swiglu(self.into(self.w1(), x_ETD), self.into(self.w3(), x_ETD))
        y_EDT = self.out(self.w2(), act_EFT)
        gates_E1T = ops.expand_dims(ops.transpose(gates_TE, (1, 0)), 1)
        # where, not the product alone: what an expert not chosen gives may be no number.
        y_EDT = ops.where(gates_E1T > 0, y_EDT * gates_E1T, ops.zeros_like(y_EDT))
        return self.summed(ops.transpose(ops.sum(y_EDT, 0), (1, 0)))


class CachedNetwork(nn.Cell):
    """Embedding, layers and the last norm, for one static shape.

    Args:
        config: the network's sizes.
        shared: weights and cache.
        kernels: the backend's operators.
        sequences: N; DECODE_TOKENS for a decoding step, 1 for a piece of a prompt.
    """

    def __init__(
        self, config: MixtralConfig, shared: SharedParameters, kernels: KernelChoice, sequences: int
    ) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = shared.tensors[EMBEDDING.name]
        self.norm = kernels.rms_norm(config.rms_norm_eps)
        attention, experts, norms = [], [], []
        for layer in range(config.num_layers):
            attention.append(CachedAttention(config, shared, layer, sequences))
            if sequences == 1:
                experts.append(SparseExperts(config, shared, layer, kernels))
            else:
                experts.append(DenseExperts(config, shared, layer))
            norms += [shared.weight(row, layer) for row in (ATTENTION_NORM, FFN_NORM)]
        self.attention = nn.CellList(attention, auto_prefix=False)
        self.experts = nn.CellList(experts, auto_prefix=False)
        self.norms = nn.CellList([*norms, shared.weight(FINAL_NORM)], auto_prefix=False)

    def construct(
        self,
        token_ids_T: Tensor,
        valid_T: Tensor,
        positions_T: Tensor,
        cos_T1d: Tensor,
        sin_T1d: Tensor,
        cache_slots_T: Tensor,
        seen_NS: Tensor,
        mask_N1tS: Tensor,
    ) -> Tensor:
        """Returns what the head takes, (T, D).

        Args:
            token_ids_T: int32; 0 for padding.
            valid_T: the padding mask: which tokens are no padding.
            positions_T: int32, of the tokens in their sequences.
            cos_T1d, sin_T1d: rotary tables at these.
            cache_slots_T: int32, where each token's key and value are written.
            seen_NS: int32, cache slots of the keys of each sequence.
            mask_N1tS: added to the scores, far below 0 where a token must not see a key.
        """
        x = ops.gather(self.embedding, token_ids_T, 0)
        for i in range(len(self.attention)):
            normed = self.norm(x, self.norms[2 * i]())
            x = x + self.attention[i](normed, cos_T1d, sin_T1d, cache_slots_T, seen_NS, mask_N1tS)
            normed = self.norm(x, self.norms[2 * i + 1]())
            x = x + self.experts[i](normed, valid_T, positions_T)
        return self.norm(x, self.norms[-1]())


class Head(nn.Cell):
    """Logits of DECODE_TOKENS."""

    def __init__(self, config: MixtralConfig, shared: SharedParameters) -> None:
        super().__init__(auto_prefix=False)
        self.weight = shared.weight(EMBEDDING if config.tie_word_embeddings else LM_HEAD)
        self.product = ops.MatMul(transpose_b=True)
        # a tied embedding is whole on every rank
        split = shared.mesh.tensor.size > 1 and not config.tie_word_embeddings
        self.gather = transports.all_gather(shared.mesh.tensor) if split else None

    def construct(self, x_TD: Tensor) -> Tensor:
        """Returns (V, T)."""
        scores = self.product(self.weight(), x_TD)
        if self.gather is None:
            return scores
        return ops.reshape(self.gather(scores), (-1, x_TD.shape[0]))
