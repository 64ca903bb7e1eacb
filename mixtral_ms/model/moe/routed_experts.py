"""The sparse mixture of experts layer (section 2.1 of arXiv 2401.04088).

Legend: B batch, S sequence, T tokens, D hidden, F intermediate, R slots, E experts, e
local experts, k experts a token.
"""

import functools
from functools import partial

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.expert_grid import expert_matrix
from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.kernels.kernel_choice import KernelChoice
from mixtral_ms.log import get_logger
from mixtral_ms.model.moe.context_dispatch import DispatchOverRanks
from mixtral_ms.model.moe.expert_parallel import ExpertExchange, PaddedExchange, experts_of_exchange
from mixtral_ms.model.moe.router import Router
from mixtral_ms.model.moe.token_dispatch import (
    CombineTokens,
    Dispatch,
    PermuteTokens,
    expert_capacity,
)
from mixtral_ms.parallel.comm.collectives import CopyToRanks, EnterSplitTwice, LeaveSplit
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import Mesh


class ExpertWeight(nn.Cell):
    """One stacked weight of all experts; a cell of its own for the parameter's name."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = zero_parameter("weight", *shape)
        self.lora_a = self.lora_b = None  # set by model/lora.py


class ExpertWeights(nn.Cell):
    """w1 and w3 (E, F, D), w2 (E, D, F)."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = ExpertWeight(experts, intermediate, hidden)
        self.w2 = ExpertWeight(experts, hidden, intermediate)
        self.w3 = ExpertWeight(experts, intermediate, hidden)

    def weights(self) -> tuple[Parameter, ...]:
        """w1, w3 and w2."""
        return self.w1.weight, self.w3.weight, self.w2.weight

    def adapters(self) -> tuple[Tensor, ...]:
        """A (E, r, in) and B (E, out, r) of w1, w3 and w2, of those that LoRA adapts."""
        found = ()
        for one in (self.w1, self.w3, self.w2):
            if one.lora_a is not None:
                found += (one.lora_a, one.lora_b)
        return found


class RoutedExperts(nn.Cell):
    """Router, token dispatch, experts, combine.

    Args:
        config: the network's sizes and its moe_config.
        layer: layer number.
        shape: batch size and sequence length on this rank, fixed for the compiled graph.
        kernels: the backend's operators.
        compute_dtype: dtype of the experts' products.
        mesh: the ranks; this one has some of the experts, and of each some of its width.
    """

    def __init__(
        self,
        config: MixtralConfig,
        layer: int,
        shape: tuple[int, int],
        kernels: KernelChoice,
        compute_dtype: mstype.Type,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        moe = config.moe_config
        _, parts, width = expert_matrix(mesh.grid)
        self.compute_dtype = compute_dtype
        self.router = Router(config.hidden_size, moe, layer, mesh.context, shape, kernels.top_k())
        self.ffn = ExpertWeights(
            moe.expert_num // parts, config.hidden_size, config.intermediate_size // width
        )
        # Cast to another dtype, weights are computed ones.
        stored = self.ffn.weights if compute_dtype == mstype.float32 else None
        self.experts, self.adapted = kernels.experts(stored), False
        self._lay_out(moe, shape, mesh)
        self.permute = PermuteTokens(moe.num_experts_chosen)
        self.combine = CombineTokens(moe.num_experts_chosen)
        self.copy_gates = CopyToRanks(mesh.tensor) if mesh.tensor.size > 1 else None

    def construct(self, x_TD: Tensor, routed_TD: Tensor, valid_T: Tensor) -> tuple:
        """Returns y_TD and what `RouterLosses` reads: the router's two, then counts of each expert.

        That is probs_TE, logits_TE, tokens_per_expert_E and kept_tokens_per_expert_E.

        routed_TD is x too, for the router. With tensor-parallel ranks y_TD is a term of the sum
        over them, and the gradients of the two inputs differ (see `EnterSplitTwice`).
        """
        gates_Tk, expert_Tk, probs_TE, logits_TE = self.router(routed_TD)
        valid_Tk = ops.broadcast_to(ops.expand_dims(valid_T, 1), expert_Tk.shape)
        (
            slot_Tk,
            not_dropped_Tk,
            assignment_R,
            tokens_per_local_expert_e,
            tokens_per_expert_E,
            kept_tokens_per_expert_E,
        ) = self.dispatch(expert_Tk, valid_Tk)
        if self.copy_gates is not None:
            gates_Tk = self.copy_gates(gates_Tk)
        gates_Tk = ops.where(not_dropped_Tk, gates_Tk, zeros_like(gates_Tk))
        x_RD = self.permute(
            ops.cast(x_TD, self.compute_dtype), assignment_R, slot_Tk, not_dropped_Tk
        )
        if self.exchange is None:
            y_RD = self._computed(x_RD, tokens_per_local_expert_e)
        elif self.in_parts:
            y_RD = self._computed_in_parts(x_RD, tokens_per_local_expert_e)
        else:
            x_ND, tokens_per_local_expert_e, dispatch_metadata = self.exchange(
                x_RD, tokens_per_local_expert_e
            )
            y_ND = self._computed(x_ND, tokens_per_local_expert_e)
            y_RD = self.exchange.combined(y_ND, dispatch_metadata)
        gates_Tk = ops.cast(gates_Tk, self.compute_dtype)
        y_TD = self.combine(y_RD, gates_Tk, assignment_R, slot_Tk, not_dropped_Tk)
        return y_TD, (probs_TE, logits_TE, tokens_per_expert_E, kept_tokens_per_expert_E)

    def _computed_in_parts(self, x_RD: Tensor, tokens_per_local_expert_e: Tensor) -> Tensor:
        dispatched: tuple[Tensor, ...] = ()
        for number in range(self.exchange.degree):
            part = self.exchange.part(x_RD, number)
            dispatched += (self.exchange(part, tokens_per_local_expert_e)[0],)
        combined: tuple[Tensor, ...] = ()
        for x_ND in dispatched:
            y_ND = self._computed(x_ND, tokens_per_local_expert_e)
            combined += (self.exchange.combined(y_ND, ()),)
        return self.exchange.joined(combined)

    def _computed(self, x_RD: Tensor, tokens_per_local_expert_e: Tensor) -> Tensor:
        w1 = ops.cast(self.ffn.w1.weight, self.compute_dtype)
        w3 = ops.cast(self.ffn.w3.weight, self.compute_dtype)
        w2 = ops.cast(self.ffn.w2.weight, self.compute_dtype)
        if self.adapted:
            return self.experts(x_RD, w1, w3, w2, tokens_per_local_expert_e, *self.ffn.adapters())
        return self.experts(x_RD, w1, w3, w2, tokens_per_local_expert_e)

    def adapt(self, experts: nn.Cell) -> None:
        """From now on these compute the outputs, and are given the adapters too."""
        self.experts, self.adapted = experts, True
        self._lay_out(*self.laid_out_for)

    def _lay_out(self, moe: MoEConfig, shape: tuple[int, int], mesh: Mesh) -> None:
        """Dispatch and exchange for the layout that the experts want."""
        self.laid_out_for = moe, shape, mesh
        tokens, layout = shape[0] * shape[1], self.experts.layout
        _, parts, _ = expert_matrix(mesh.grid)
        capacity = None
        if not moe.dropless:
            capacity = expert_capacity(
                tokens * mesh.context.size,
                moe.num_experts_chosen,
                moe.expert_num,
                moe.capacity_factor,
            )
        dispatch = partial(Dispatch, moe.expert_num, token_first=moe.enable_sdrop)
        local_experts = experts_of_exchange(mesh, moe.expert_num) if parts > 1 else None
        alone = mesh.context.size == 1
        local_dispatch = dispatch(
            capacity if alone else None, layout=layout, local_experts=local_experts
        )
        self.dispatch = local_dispatch
        if not alone:
            whole = dispatch(capacity, layout="packed")
            self.dispatch = DispatchOverRanks(mesh.context, shape, whole, local_dispatch)
        self.exchange: nn.Cell = self._exchange(moe, tokens, capacity, local_experts, mesh)
        self.in_parts = isinstance(self.exchange, PaddedExchange) and self.exchange.degree > 1
        if moe.comp_comm_parallel and not self.in_parts:
            _say_nothing_overlaps()

    def _exchange(
        self,
        moe: MoEConfig,
        tokens: int,
        capacity: int | None,
        local_experts: list[int] | None,
        mesh: Mesh,
    ) -> ExpertExchange | PaddedExchange | None:
        if local_experts is None or mesh.exchange.size == 1:
            return None
        if self.experts.layout == "padded" and capacity is not None:
            parts = moe.exchange_parts
            return PaddedExchange(mesh.exchange, len(local_experts), capacity, parts)
        slots = tokens * moe.num_experts_chosen
        return ExpertExchange(mesh.exchange, len(local_experts), slots, capacity)


@functools.cache
def _say_nothing_overlaps() -> None:
    get_logger().info(
        "moe_config.comp_comm_parallel has no effect: it needs expert_parallel above 1, "
        "capacity_factor above 0, no context_parallel, and experts with slots of fixed number, "
        "which the CPU's own kernels do not have"
    )


class MoEFeedForward(nn.Cell):
    """The feed-forward part of a layer; `routed_experts` is MindFormers' name for its content."""

    def __init__(  # noqa: PLR0913 - everything its graph depends on
        self,
        config: MixtralConfig,
        layer: int,
        shape: tuple[int, int],
        kernels: KernelChoice,
        compute_dtype: mstype.Type,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        self.routed_experts = RoutedExperts(config, layer, shape, kernels, compute_dtype, mesh)
        self.enter = None
        self.leave: nn.Cell = None  # nobody asks for it without `enter`
        if mesh.tensor.size > 1:
            self.enter = EnterSplitTwice(mesh.tensor, sequence=mesh.grid.use_seq_parallel)
            self.leave = LeaveSplit(mesh.tensor, sequence=mesh.grid.use_seq_parallel)

    def construct(self, x_BSD: Tensor, valid_T: Tensor) -> tuple:
        """As `RoutedExperts`, on (B, S, D)."""
        if self.enter is None:
            x_TD = _flat(x_BSD)
            y_TD, routing = self.routed_experts(x_TD, x_TD, valid_T)
            return ops.reshape(y_TD, x_BSD.shape), routing
        x_BSD, routed_BSD = self.enter(x_BSD)
        y_TD, routing = self.routed_experts(_flat(x_BSD), _flat(routed_BSD), valid_T)
        return self.leave(ops.reshape(y_TD, x_BSD.shape)), routing


def _flat(x_BSD: Tensor) -> Tensor:
    return ops.reshape(x_BSD, (-1, x_BSD.shape[-1]))
