"""The router's top-k by the operator whose order of equal values is documented.

Legend: T tokens, E experts, k experts a token.
"""

from mindspore import Tensor, mint, nn, ops
from mindspore import dtype as mstype


class DocumentedTopK(nn.Cell):
    """`mint.topk`: of equal values the one with the smaller index comes first.

    Values are gathered by their indices, so that gradients go by an operator that is documented
    too: that of `mint.topk` scatters in place.
    """

    def construct(self, scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row, and their indices (int32)."""
        found = mint.topk(ops.stop_gradient(scores_TE), top_k, -1, True, True)
        index_Tk = ops.cast(found[1], mstype.int32)
        return ops.gather_elements(scores_TE, 1, index_Tk), index_Tk
