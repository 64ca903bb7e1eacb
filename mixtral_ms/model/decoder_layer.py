"""Attention and decoder layer, of which each rank computes its part.

Legend: B batch, S sequence (with context parallel: this rank's part), D hidden, H heads, K kv
heads, d head_dim.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.cells.attention import AttentionSizes
from mixtral_ms.kernels.kernel_choice import KernelChoice
from mixtral_ms.model.moe.routed_experts import MoEFeedForward
from mixtral_ms.model.nn.compute_dtype import compute_type
from mixtral_ms.model.nn.linear import Linear
from mixtral_ms.parallel.comm.collectives import EnterSplit, LeaveSplit
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.grid.mesh import Mesh


class RMSNorm(nn.Cell):
    """Root mean square norm with a learned scale."""

    def __init__(self, hidden_size: int, eps: float, kernels: KernelChoice) -> None:
        super().__init__()
        self.norm = kernels.rms_norm(eps)
        self.weight = zero_parameter("weight", hidden_size)

    def construct(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        return self.norm(x, self.weight)


def attention_sizes(config: MixtralConfig, seq_length: int, mesh: Mesh) -> AttentionSizes:
    """Of this rank's heads, and of its part of the sequence, which has this length."""
    return AttentionSizes(
        seq_length,
        config.num_heads // mesh.tensor.size,
        config.n_kv_heads // mesh.tensor.size,
        config.head_dim,
        config.sliding_window,
        compute_type(config.softmax_compute_type),
    )


class Attention(nn.Cell):
    """Grouped-query attention with rotary embedding; tensor-parallel ranks have heads each."""

    def __init__(
        self,
        config: MixtralConfig,
        seq_length: int,
        kernels: KernelChoice,
        dtype: mstype.Type,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        num_heads = config.num_heads // mesh.tensor.size
        n_kv_heads = config.n_kv_heads // mesh.tensor.size
        queries, keys = num_heads * config.head_dim, n_kv_heads * config.head_dim
        bias = config.qkv_has_bias
        self.wq = Linear(config.hidden_size, queries, bias, dtype)
        self.wk = Linear(config.hidden_size, keys, bias, dtype)
        self.wv = Linear(config.hidden_size, keys, bias, dtype)
        self.enter = leave = None
        if mesh.tensor.size > 1:
            self.enter = EnterSplit(mesh.tensor, sequence=mesh.grid.use_seq_parallel)
            leave = LeaveSplit(mesh.tensor, sequence=mesh.grid.use_seq_parallel)
        self.wo = Linear(queries, config.hidden_size, config.attn_proj_has_bias, dtype, leave)
        sizes = attention_sizes(config, seq_length, mesh)
        if mesh.context.size > 1:
            self.attend = kernels.context_attention(mesh.context, sizes)
        else:
            self.attend = kernels.attention(sizes)

    def construct(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, S, D)."""
        if self.enter is not None:
            x_BSD = self.enter(x_BSD)
        q = self.wq(x_BSD)
        k = self.wk(x_BSD)
        v = self.wv(x_BSD)
        return self.wo(self.attend(q, k, v, cos, sin, positions_BS, segment_ids_BS))


class DecoderLayer(nn.Cell):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(  # noqa: PLR0913 - everything a layer's graph depends on
        self,
        config: MixtralConfig,
        layer: int,
        batch_size: int,
        seq_length: int,
        kernels: KernelChoice,
        dtype: mstype.Type,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attention = Attention(config, seq_length, kernels, dtype, mesh)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.feed_forward = MoEFeedForward(
            config, layer, (batch_size, seq_length), kernels, dtype, mesh
        )

    def construct(
        self,
        x_BSD: Tensor,
        valid_T: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions_BS: Tensor | None = None,
        segment_ids_BS: Tensor | None = None,
    ) -> tuple:
        """Returns (B, S, D) and what the router decided (see `RoutedExperts`)."""
        normed = self.attention_norm(x_BSD)
        attended = self.attention(normed, cos, sin, positions_BS, segment_ids_BS)
        x_BSD = x_BSD + ops.cast(attended, x_BSD.dtype)
        y_BSD, routing = self.feed_forward(self.ffn_norm(x_BSD), valid_T)
        return x_BSD + ops.cast(y_BSD, x_BSD.dtype), routing
