"""Causal language modelling: cross entropy of the token that follows.

Legend: B batch, S sequence, D hidden.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.objectives.objective import Objective


class CausalLMObjective(Objective):
    """Mean cross entropy over supervised tokens, plus the routers' losses."""

    part_names = ("lm_loss",)

    def end_parts(self, hidden_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor]:
        """Summed cross entropy."""
        return (self.network.summed_cross_entropy(hidden_BSD, labels_BS),)


class CausalLMLoss(nn.Cell):
    """The loss of one batch on its own, as a cell that other trainers and tests differentiate.

    Args:
        network: without pipeline stages.
    """

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.objective = network, CausalLMObjective(network)

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        """The loss, then the parts of `Objective.stage_parts`."""
        _, *parts = self.objective.stage_parts(
            None, input_ids_BS, segment_ids_BS, positions_BS, labels_BS
        )
        one = Tensor(1.0, mstype.float32)
        tokens = ops.sum(ops.cast(self.network.target_ids(labels_BS) >= 0, mstype.float32))
        return (self.objective.weigh(parts, one / ops.maximum(tokens, one), one), *parts)
