"""The router: which experts a token visits, with what weight, and how even the load is.

Legend: T tokens, D hidden, E experts, k experts a token, L layers.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.sections.model_section import MoEConfig
from mixtral_ms.model.moe.router_policy import router_policy
from mixtral_ms.model.nn.hash_noise import hash_uniform
from mixtral_ms.model.nn.linear import Linear
from mixtral_ms.parallel.comm.collectives import SumOverRanks
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup


class Router(nn.Cell):
    """Logits of all experts, of which the configuration's policy makes a choice.

    Everything is float32: a rounding in bfloat16 changes which expert wins.

    Args:
        hidden_size: D.
        config: experts, top-k, gates, jitter.
        layer: layer number, so that jitter differs between layers.
        context: the ranks that split the sequence.
        shape: batch and the length of the own part of the sequence, of which T is made.
        top_k: as of `router_policy`.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        layer: int,
        context: ProcessGroup = ALONE,
        shape: tuple[int, int] = (0, 0),
        top_k: nn.Cell | ops.Primitive | None = None,
    ) -> None:
        super().__init__()
        self.numbers_T = None
        if context.size > 1:
            self.numbers_T = Tensor(_token_numbers(context, *shape))
        self.layer, self.jitter = layer, config.router_jitter
        self.dense = Linear(hidden_size, config.expert_num, compute_dtype=mstype.float32)
        policy = router_policy(config, top_k)
        self.score, self.choose = policy.scores(), policy.choice()
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
        probs_TE = self.score(logits_TE)
        chosen = self.choose(probs_TE, self.numbers_T)
        return chosen[0], chosen[1], probs_TE, logits_TE

    def _noise(self, x_TD: Tensor) -> Tensor:
        """uniform(1 - jitter, 1 + jitter), a pure function of `jitter_key`, a whole number."""
        uniform_TD = hash_uniform(
            x_TD.shape[0], x_TD.shape[1], self.jitter_key, self.layer, self.numbers_T
        )
        return 1.0 - self.jitter + 2.0 * self.jitter * uniform_TD


class RouterLosses(nn.Cell):
    """Auxiliary (load balancing) and z loss of each layer, over valid tokens only, and figures.

    All layers together: a graph with these operators once compiles sooner than with them in each.

    Args:
        config: experts, top-k and the losses' factors.
        context: the ranks that split the sequence; losses are over the tokens of all of them.
    """

    def __init__(self, config: MoEConfig, context: ProcessGroup = ALONE) -> None:
        super().__init__()
        self.experts, self.top_k = config.expert_num, config.num_experts_chosen
        self.aux_factor, self.z_factor = config.aux_loss_factor, config.z_loss_factor
        self.over_ranks = SumOverRanks(context) if context.size > 1 else None

    def construct(
        self,
        probs_LTE: Tensor,
        logits_LTE: Tensor,
        tokens_per_expert_LE: Tensor,
        kept_tokens_per_expert_LE: Tensor,
        valid_T: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns aux_L, z_L, load_LE, dropped_L and entropy_L.

        aux = factor * E * sum_e f_e P_e, where f_e is the share of assignments to expert e before
        any drop (it sums to 1) and P_e the mean probability: 1 * factor when the load is even.
        z = factor * mean(logsumexp(logits)^2) (arXiv 2202.08906).
        load is the share of assignments to each expert before dropping, dropped the share of them
        that got no slot, entropy that of the router's softmax in nats, a mean over tokens.

        Args:
            probs_LTE: the router's softmax.
            logits_LTE: what it is of.
            tokens_per_expert_LE: assignments before dropping, of all ranks.
            kept_tokens_per_expert_LE: those that were not dropped.
            valid_T: which tokens are not padding.
        """
        weight_T = ops.cast(valid_T, mstype.float32)
        one = Tensor(1.0, mstype.float32)
        tokens = ops.maximum(self._summed(ops.sum(weight_T)), one)
        tokens_per_expert_LE = ops.cast(tokens_per_expert_LE, mstype.float32)
        share_LE = tokens_per_expert_LE / (tokens * self.top_k)
        mean_LE = self._summed(ops.sum(probs_LTE * ops.expand_dims(weight_T, 1), 1)) / tokens
        aux_L = self.aux_factor * self.experts * ops.sum(share_LE * mean_LE, 1)
        peak_LT1 = ops.stop_gradient(ops.amax(logits_LTE, 2, True))
        log_sum_LT = ops.log(ops.sum(ops.exp(logits_LTE - peak_LT1), 2)) + peak_LT1[:, :, 0]
        z_L = self.z_factor * self._summed(ops.sum(ops.square(log_sum_LT) * weight_T, 1)) / tokens

        probs_LTE = ops.stop_gradient(probs_LTE)
        entropy_LT = -ops.sum(probs_LTE * ops.log(probs_LTE + 1e-20), 2)
        entropy_L = self._summed(ops.sum(entropy_LT * weight_T, 1)) / tokens
        assigned_L = ops.sum(tokens_per_expert_LE, 1)
        total_L = ops.maximum(assigned_L, one)
        load_LE = tokens_per_expert_LE / ops.expand_dims(total_L, 1)
        kept_L = ops.sum(ops.cast(kept_tokens_per_expert_LE, mstype.float32), 1)
        # of padding alone nothing is kept, and nothing dropped
        dropped_L = ops.minimum(1.0 - kept_L / total_L, assigned_L)
        return aux_L, z_L, load_LE, dropped_L, entropy_L

    def _summed(self, x: Tensor) -> Tensor:
        return x if self.over_ranks is None else self.over_ranks(x)


def _token_numbers(context: ProcessGroup, batch: int, length: int) -> np.ndarray:
    """The numbers in the whole batch of the tokens of this rank's part of the sequences."""
    first_B1 = np.arange(batch)[:, None] * (context.size * length)
    return (first_B1 + context.index * length + np.arange(length)).ravel().astype(np.float32)
