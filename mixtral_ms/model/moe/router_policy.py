"""The routing rule: which experts a token visits, with what gates. Training and inference share it.

The C++ decoder has the rule of TopkRouterV2 once more (infer/runners/cpp/decoder_experts.cpp); one
table of cases holds all of them together (tests/helpers/network_cases.py).

Legend: T tokens, E experts, k experts a token.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.sections.model_section import ROUTING_POLICIES, MoEConfig
from mixtral_ms.errors import UserError

_GATE_EPS = 1e-9


class RouterPolicy:
    """How a router scores and chooses experts: MindFormers' TopkRouterV2.

    A subclass is another policy: it gives other `scores`, another `choice`, or both, as cells
    without parameters. What every router has besides (weight, jitter, losses) is not its matter.

    Args:
        config: experts, top-k, gates.
    """

    top_k: nn.Cell | ops.Primitive = ops.TopK(sorted=True)
    """The device's operator for the k best."""

    def __init__(self, config: MoEConfig) -> None:
        self.config = config

    def scores(self) -> nn.Cell | ops.Primitive:
        """Makes scores_TE of the logits (float32), which the losses take for probabilities."""
        return ops.Softmax(-1)

    def choice(self) -> nn.Cell:
        """Makes gates_Tk and expert_Tk (int32) of scores_TE and the tokens' numbers."""
        return ChooseExperts(self.config, self.top_k)


class ChooseExperts(nn.Cell):
    """The k best of each token, their gates renormalised to sum 1.

    Which of equal scores are taken is the operator's matter.

    Args:
        config: experts, top-k, gates, `uniform_routing`.
        top: finds the k best: scores, k -> values, indices.
    """

    def __init__(
        self, config: MoEConfig, top: nn.Cell | ops.Primitive = RouterPolicy.top_k
    ) -> None:
        super().__init__()
        self.experts, self.top_k = config.expert_num, config.num_experts_chosen
        self.normalise, self.uniform = config.norm_topk_prob, config.uniform_routing
        self.top = top
        self.choices_k = Tensor(np.arange(self.top_k, dtype=np.int32))

    def construct(self, scores_TE: Tensor, numbers_T: Tensor | None = None) -> tuple:
        """Returns gates_Tk and expert_Tk (int32), best first.

        Args:
            scores_TE: float32.
            numbers_T: the tokens' numbers, where these are not 0, 1, ...: experts in turn are those
                of the token's number.
        """
        gates_Tk, expert_Tk = self.top(scores_TE, self.top_k)
        if self.uniform:
            if numbers_T is None:
                numbers_T = ops.arange(0, scores_TE.shape[0], 1, dtype=mstype.int32)
            numbers_T1 = ops.expand_dims(ops.cast(numbers_T, mstype.int32), 1)
            expert_Tk = (numbers_T1 * self.top_k + self.choices_k) % self.experts
            gates_Tk = ops.gather_elements(scores_TE, 1, expert_Tk)
        if self.normalise:
            gates_Tk = gates_Tk / (ops.sum(gates_Tk, 1, keepdim=True) + _GATE_EPS)
        return gates_Tk, ops.stop_gradient(expert_Tk)


ROUTER_POLICIES: dict[str, type[RouterPolicy]] = {"TopkRouterV2": RouterPolicy}
"""The policy of each value of `moe_config.routing_policy`."""


def router_policy(config: MoEConfig, top_k: nn.Cell | ops.Primitive | None = None) -> RouterPolicy:
    """The policy that a configuration names.

    Args:
        config: its routing_policy.
        top_k: the device's operator for the k best; None for MindSpore's on any device.

    Raises:
        UserError: there is none of that name.
    """
    policy = ROUTER_POLICIES.get(config.routing_policy)
    if policy is None:
        raise UserError(
            f"moe_config.routing_policy {config.routing_policy!r}: there are "
            f"{', '.join(ROUTER_POLICIES)}"
        )
    made = policy(config)
    if top_k is not None:
        made.top_k = top_k
    return made


def add_router_policy(name: str, policy: type[RouterPolicy]) -> None:
    """Have another value of `moe_config.routing_policy`, before a configuration is loaded.

    Raises:
        ValueError: that name is taken.
    """
    if name in ROUTER_POLICIES:
        raise ValueError(f"there is a router policy {name!r} already")
    ROUTER_POLICIES[name] = policy
    ROUTING_POLICIES.append(name)
