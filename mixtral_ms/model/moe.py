"""The sparse mixture of experts layer (section 2.1 of arXiv 2401.04088).

Legend: B batch, S sequence, T tokens, D hidden, F intermediate, E experts, k experts a token.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.kernels.select import KernelChoice
from mixtral_ms.model.dispatch import CombineTokens, Dispatch, PermuteTokens, expert_capacity
from mixtral_ms.model.linear import empty_parameter
from mixtral_ms.model.router import Router


class ExpertWeight(nn.Cell):
    """One stacked weight of all experts; a cell of its own for the parameter's name."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = empty_parameter("weight", *shape)
        self.lora_a = self.lora_b = None  # set by model/lora.py

    def construct(self, dtype: mstype.Type) -> Tensor:
        """The weight in the compute dtype."""
        return ops.cast(self.weight, dtype)


class ExpertWeights(nn.Cell):
    """w1 and w3 (E, F, D), w2 (E, D, F)."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = ExpertWeight(experts, intermediate, hidden)
        self.w2 = ExpertWeight(experts, hidden, intermediate)
        self.w3 = ExpertWeight(experts, intermediate, hidden)

    def adapters(self) -> tuple[Tensor, ...]:
        """A (E, r, in) and B (E, out, r) of w1, w3 and w2, of those that LoRA adapts."""
        found = ()
        for one in (self.w1, self.w3, self.w2):
            if one.lora_a is not None:
                found += (one.lora_a, one.lora_b)
        return found


class RoutedExperts(nn.Cell):
    """Router, dispatch, experts, combine.

    Args:
        config: the network's sizes and its moe_config.
        layer: layer number.
        tokens: T, tokens of a batch, fixed for the compiled graph.
        kernels: the backend's operators.
        compute_dtype: dtype of the experts' products.
    """

    def __init__(
        self,
        config: MixtralConfig,
        layer: int,
        tokens: int,
        kernels: KernelChoice,
        compute_dtype: mstype.Type,
    ) -> None:
        super().__init__()
        moe = config.moe_config
        self.compute_dtype = compute_dtype
        self.router = Router(config.hidden_size, moe, layer)
        self.ffn = ExpertWeights(moe.expert_num, config.hidden_size, config.intermediate_size)
        self.experts = kernels.experts()
        capacity = None
        if not moe.dropless:
            capacity = expert_capacity(
                tokens, moe.num_experts_chosen, moe.expert_num, moe.capacity_factor
            )
        self.dispatch = Dispatch(moe.expert_num, capacity, moe.enable_sdrop, self.experts.layout)
        self.permute = PermuteTokens(moe.num_experts_chosen)
        self.combine = CombineTokens(moe.num_experts_chosen)

    def construct(self, x_TD: Tensor, valid_T: Tensor) -> tuple:
        """Returns y_TD and the layer's (aux, z, load_E, dropped share, router entropy).

        load_E is the share of assignments to each expert before dropping; the entropy, in nats,
        is the mean over tokens of the router's softmax.
        """
        gates_Tk, expert_Tk, probs_TE, logits_TE = self.router(x_TD)
        placed = self.dispatch(expert_Tk, valid_T)
        row_Tk, kept_Tk, assignment_R, sizes_E, counts_E = [ops.stop_gradient(p) for p in placed]
        gates_Tk = ops.where(kept_Tk, gates_Tk, ops.zeros_like(gates_Tk))
        x_RD = self.permute(ops.cast(x_TD, self.compute_dtype), assignment_R, row_Tk, kept_Tk)
        y_RD = self.experts(
            x_RD,
            self.ffn.w1(self.compute_dtype),
            self.ffn.w3(self.compute_dtype),
            self.ffn.w2(self.compute_dtype),
            sizes_E,
            *self.ffn.adapters(),
        )
        y_TD = self.combine(y_RD, ops.cast(gates_Tk, self.compute_dtype), assignment_R, row_Tk)
        aux, z = self.router.losses(probs_TE, logits_TE, counts_E, valid_T)
        return y_TD, aux, z, *_statistics(probs_TE, counts_E, sizes_E, valid_T)


def _statistics(
    probs_TE: Tensor, counts_E: Tensor, sizes_E: Tensor, valid_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """load_E, dropped share and router entropy, for the log only."""
    probs_TE = ops.stop_gradient(probs_TE)
    counts_E = ops.cast(counts_E, mstype.float32)
    total = ops.maximum(ops.sum(counts_E), Tensor(1.0, mstype.float32))
    dropped = 1.0 - ops.sum(ops.cast(sizes_E, mstype.float32)) / total
    weight_T = ops.cast(valid_T, mstype.float32)
    entropy_T = -ops.sum(probs_TE * ops.log(probs_TE + 1e-20), 1)
    tokens = ops.maximum(ops.sum(weight_T), Tensor(1.0, mstype.float32))
    return counts_E / total, dropped, ops.sum(entropy_T * weight_T) / tokens


class MoEFeedForward(nn.Cell):
    """The feed-forward part of a layer; `routed_experts` is MindFormers' name for its content."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.routed_experts = RoutedExperts(*args)

    def construct(self, x_BSD: Tensor, valid_T: Tensor) -> tuple:
        """As `RoutedExperts`, on (B, S, D)."""
        shape = x_BSD.shape
        outputs = self.routed_experts(ops.reshape(x_BSD, (-1, shape[-1])), valid_T)
        return (ops.reshape(outputs[0], shape), *outputs[1:])
