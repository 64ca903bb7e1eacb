"""TopkRouterV2: which experts a token visits, with what weight, and how even the load is.

Legend: T tokens, D hidden, E experts, k experts a token.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.model import MoEConfig
from mixtral_ms.model.linear import Linear
from mixtral_ms.model.noise import hash_uniform
from mixtral_ms.parallel.collectives import SumOverRanks
from mixtral_ms.parallel.mesh import ALONE, ProcessGroup

_GATE_EPS = 1e-9


class Router(nn.Cell):
    """Softmax over all experts, top-k, gates renormalised to sum 1.

    Everything is float32: a rounding in bfloat16 changes which expert wins.

    Args:
        hidden_size: D.
        config: experts, top-k, loss factors, jitter.
        layer: layer number, so that jitter differs between layers.
        context: the ranks that split the sequence; losses are over the tokens of all of them.
        shape: batch and the length of the own part of the sequence, of which T is made.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        layer: int,
        context: ProcessGroup = ALONE,
        shape: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.over_ranks = self.numbers_T = None
        if context.size > 1:
            self.over_ranks = SumOverRanks(context)
            self.numbers_T = Tensor(_token_numbers(context, *shape))
        self.experts, self.top_k, self.layer = config.expert_num, config.num_experts_chosen, layer
        self.aux_factor, self.z_factor = config.aux_loss_factor, config.z_loss_factor
        self.normalise, self.uniform = config.norm_topk_prob, config.uniform_routing
        self.jitter = config.router_jitter
        self.dense = Linear(hidden_size, config.expert_num, compute_dtype=mstype.float32)
        self.softmax = ops.Softmax(-1)
        self.top = ops.TopK(sorted=True)
        if self.jitter > 0:
            self.jitter_key = Parameter(
                Tensor(0, mstype.float32), name="jitter_key", requires_grad=False
            )

    def construct(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns gates_Tk, expert_Tk (int32), probs_TE and logits_TE."""
        x_TD = ops.cast(x_TD, mstype.float32)
        if self.jitter > 0 and self.training:
            x_TD = x_TD * self._noise(x_TD)
        logits_TE = self.dense(x_TD)
        probs_TE = self.softmax(logits_TE)
        gates_Tk, expert_Tk = self.top(probs_TE, self.top_k)
        if self.uniform:
            tokens = probs_TE.shape[0]
            turn = ops.arange(0, tokens * self.top_k, 1, dtype=mstype.int32) % self.experts
            expert_Tk = ops.reshape(turn, (tokens, self.top_k))
            gates_Tk = ops.gather_elements(probs_TE, 1, expert_Tk)
        if self.normalise:
            gates_Tk = gates_Tk / (ops.sum(gates_Tk, 1, keepdim=True) + _GATE_EPS)
        return gates_Tk, ops.stop_gradient(expert_Tk), probs_TE, logits_TE

    def losses(
        self, probs_TE: Tensor, logits_TE: Tensor, counts_E: Tensor, valid_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted balance loss and z loss of this layer, over valid tokens only.

        aux = factor * E * sum_e f_e P_e, where f_e is the share of assignments to expert e before
        any drop (it sums to 1) and P_e the mean probability: 1 * factor when the load is even.
        z = factor * mean(logsumexp(logits)^2) (arXiv 2202.08906).
        """
        weight_T1 = ops.expand_dims(ops.cast(valid_T, mstype.float32), 1)
        tokens = ops.maximum(self._summed(ops.sum(weight_T1)), Tensor(1.0, mstype.float32))
        share_E = ops.stop_gradient(ops.cast(counts_E, mstype.float32)) / (tokens * self.top_k)
        mean_E = self._summed(ops.sum(probs_TE * weight_T1, 0)) / tokens
        aux = self.aux_factor * self.experts * ops.sum(share_E * mean_E)
        peak_T1 = ops.stop_gradient(ops.max(logits_TE, 1, keepdims=True)[0])
        log_sum_T1 = ops.log(ops.sum(ops.exp(logits_TE - peak_T1), 1, keepdim=True)) + peak_T1
        z = self.z_factor * self._summed(ops.sum(ops.square(log_sum_T1) * weight_T1)) / tokens
        return aux, z

    def statistics(
        self, probs_TE: Tensor, counts_E: Tensor, taken_E: Tensor, valid_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """load_E, dropped share and router entropy, for the log only."""
        probs_TE = ops.stop_gradient(probs_TE)
        counts_E = ops.cast(counts_E, mstype.float32)
        total = ops.maximum(ops.sum(counts_E), Tensor(1.0, mstype.float32))
        dropped = 1.0 - ops.sum(ops.cast(taken_E, mstype.float32)) / total
        weight_T = ops.cast(valid_T, mstype.float32)
        entropy_T = -ops.sum(probs_TE * ops.log(probs_TE + 1e-20), 1)
        tokens = ops.maximum(self._summed(ops.sum(weight_T)), Tensor(1.0, mstype.float32))
        return counts_E / total, dropped, self._summed(ops.sum(entropy_T * weight_T)) / tokens

    def _summed(self, x: Tensor) -> Tensor:
        return x if self.over_ranks is None else self.over_ranks(x)

    def _noise(self, x_TD: Tensor) -> Tensor:
        """uniform(1 - jitter, 1 + jitter), a pure function of `jitter_key`, a whole number."""
        uniform_TD = hash_uniform(*x_TD.shape, self.jitter_key, self.layer, self.numbers_T)
        return 1.0 - self.jitter + 2.0 * self.jitter * uniform_TD


def _token_numbers(context: ProcessGroup, batch: int, length: int) -> np.ndarray:
    """The numbers in the whole batch of the tokens of this rank's part of the sequences."""
    rows = np.arange(batch)[:, None] * (context.size * length)
    return (rows + context.index * length + np.arange(length)).ravel().astype(np.float32)
