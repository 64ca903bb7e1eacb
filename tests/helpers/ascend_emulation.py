"""Ascend's operators on a CPU, as their documentation describes them.

They raise where a documented rule is broken, and give NaN where the documentation says nothing of
the result. One rule is not held here, that attention takes 16 bit only: float32 stands for it, so
that results can be compared closely; the front end sees the real dtypes.

Sources: docstrings of MindSpore 2.7.2; for rows behind the last group, CANN's aclnnGroupedMatmul.

Legend: B batch, S positions of queries, W of keys, N heads, K kv heads, d head_dim, R rows,
E experts.
"""

import mindspore
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.ascend import flash_attention, fused_adamw, grouped_experts
from mixtral_ms.parallel.comm.graph_primitives import zeros_like

FLOATS = (mstype.float16, mstype.bfloat16, mstype.float32)
WHOLE, CAUSAL, RIGHT_DOWN, BAND = 1, 2, 3, 4


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"documented: {rule}")


def emulate_ascend(monkeypatch):
    """Until the patch is undone, backend "ascend" computes on this CPU."""
    monkeypatch.setattr(grouped_experts, "GroupedMatmul", GroupedMatmul)
    monkeypatch.setattr(flash_attention, "FLOAT32_AS", mstype.float32)
    monkeypatch.setattr(ops, "flash_attention_score", flash_attention_score)
    for operator in (rms_norm, rotary_position_embedding, swiglu):
        monkeypatch.setattr(ops, operator.__name__, operator)
    monkeypatch.setattr(mint, "transpose", transpose)
    monkeypatch.setattr(mint, "topk", topk)
    monkeypatch.setattr(fused_adamw, "AdamW", AdamW)


class AdamW:
    """The update as documented, in float64. It is not said whether `step` counts from 0 or from 1.

    Args:
        first: what it counts from.
    """

    def __init__(self, first=0):
        self.first = first

    def __call__(  # noqa: PLR0913, PLR0917 - the operator's
        self,
        var,
        m,
        v,
        max_v,
        gradient,
        step,
        lr,
        beta1,
        beta2,
        decay,
        eps,
        amsgrad=False,
        maximize=False,
    ):
        require(all(one.dtype in FLOATS[::2] for one in (var, m)), "var and m: float16, float32")
        require(gradient.dtype == var.dtype, "gradient has the dtype of var")
        require(m.dtype == v.dtype == max_v.dtype, "the moments have one dtype")
        require(gradient.shape == var.shape, "gradient has the shape of var")
        require(m.shape == v.shape == max_v.shape == var.shape, "so have the moments")
        require(all(isinstance(one, float) for one in (lr, beta1, beta2, decay, eps)), "floats")
        require(not amsgrad and not maximize, "the emulation knows neither")
        rate, beta1, beta2, decay, eps = (
            float(np.float32(one)) for one in (lr, beta1, beta2, decay, eps)
        )
        t = float(step.asnumpy()[0]) + 1 - self.first
        values = [one.asnumpy().astype(np.float64) for one in (var, m, v, gradient)]
        value, first, second, slope = values
        value *= 1 - rate * decay
        first = beta1 * first + (1 - beta1) * slope
        second = beta2 * second + (1 - beta2) * slope**2
        root = np.sqrt(second / (1 - beta2**t))
        value -= rate * first / (1 - beta1**t) / (root + eps)
        for parameter, new in ((var, value), (m, first), (v, second)):
            ops.assign(parameter, Tensor(new, parameter.dtype))


def transpose(x_EFD, first, second):
    """A view there; here a copy."""
    require((first, second) == (1, 2), "the emulation knows the two axes of experts' matrices")
    return ops.transpose(x_EFD, (0, 2, 1))


def rms_norm(x, gamma, epsilon=1e-6):
    """Root mean square norm, and 1 / rms."""
    require(x.dtype in FLOATS, "rms_norm takes float16, bfloat16 and float32")
    require(x.dtype == gamma.dtype, "rms_norm's gamma has the dtype of x")
    require(0 < epsilon <= 1, "rms_norm's epsilon is in (0, 1]")
    x32 = ops.cast(x, mstype.float32)
    scale = ops.rsqrt(ops.mean(x32 * x32, -1, True) + epsilon)
    return ops.cast(x32 * scale * ops.cast(gamma, mstype.float32), x.dtype), scale


def rotary_position_embedding(x, cos, sin, mode=0):
    """Halves turned; x (B, S, N, d) with tables (1 or B, S, 1, d)."""
    batch, length, heads, width = x.shape
    require(mode == 0, "mode 0 turns halves")
    require(x.dtype in FLOATS, "rotary_position_embedding takes float16, bfloat16 and float32")
    require(x.dtype == cos.dtype == sin.dtype, "tables have the dtype of x")
    require(width % 2 == 0 and width < 896, "d is even, below 896")
    require(max(batch, heads) < 1000, "B and N are below 1000")
    require(cos.shape == sin.shape, "the tables have one shape")
    require(cos.shape in ((1, length, 1, width), (batch, length, 1, width)), "1S1D or BS1D")
    turned = ops.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
    return x * cos + turned * sin


def topk(input, k, dim=-1, largest=True, sorted=True):  # noqa: A002 - the operator's
    """The k largest; of equal ones that with the smaller index first. No gradient here."""
    require(input.ndim == 2 and dim == -1, "the emulation knows rows")
    require(largest and sorted, "the emulation knows the largest, in order")
    columns = Tensor(np.arange(input.shape[1]))
    rest, found = input, ()
    for _ in range(k):
        best = ops.argmax(rest, -1, True)  # the first of equal ones
        found += (best,)
        rest = ops.masked_fill(rest, columns == best, Tensor(-np.inf, rest.dtype))
    indices = ops.cat(found, -1)
    return ops.gather_elements(input, 1, indices), indices


def swiglu(input, dim=-1):  # noqa: A002 - the operator's
    """silu of the first half times the second."""
    require(input.dtype in FLOATS, "swiglu takes float16, bfloat16 and float32")
    require(dim == -1 and input.shape[-1] % 2 == 0, "an axis that divides by 2; here the last")
    half = input.shape[-1] // 2
    gate = input[..., :half]
    return gate * ops.sigmoid(gate) * input[..., half:]


class GroupedMatmul(nn.Cell):
    """Rows in groups times the matrix of their group; NaN behind the last one."""

    def __init__(self, split_item, group_type):
        super().__init__()
        require(split_item == 3, "split_item 3: one output")
        require(group_type == 0, "group_type 0: groups of rows; others have no gradient here")
        self.product = _GroupedProduct()

    def construct(  # noqa: PLR0913 - the operator's
        self, x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, group_list
    ):
        require(len(x) == len(weight) == 1, "one x and one weight with split_item 3")
        x_RI, weight_EIO = x[0], weight[0]
        require(x_RI.dtype in FLOATS, "float16, bfloat16 and float32")
        require(x_RI.dtype == weight_EIO.dtype, "x and weight of one dtype")
        require(x_RI.ndim == 2 and weight_EIO.ndim == 3, "x (R, in) and weight (E, in, out)")
        require(x_RI.shape[1] == weight_EIO.shape[1], "inner sizes are the same")
        require(max(x_RI.shape[1], weight_EIO.shape[2]) < 65536, "last axes below 65536")
        require(group_list.dtype == mstype.int64, "group_list is int64")
        require(group_list.shape == weight_EIO.shape[:1], "one entry a group")
        return (self.product(x_RI, weight_EIO, group_list),)


class _GroupedProduct(nn.Cell):
    def construct(self, x_RI, weight_EIO, ends_E):
        return _grouped(x_RI, weight_EIO, ends_E)

    def bprop(self, x_RI, weight_EIO, ends_E, out, dout):
        dx_RI = _grouped(dout, ops.transpose(weight_EIO, (0, 2, 1)), ends_E)
        d_weight = ()
        for expert in range(weight_EIO.shape[0]):
            own_R1 = _rows_of(expert, x_RI.shape[0], ends_E)
            x_own = ops.select(ops.broadcast_to(own_R1, x_RI.shape), x_RI, zeros_like(x_RI))
            d_own = ops.select(ops.broadcast_to(own_R1, dout.shape), dout, zeros_like(dout))
            d_weight += (ops.matmul(ops.transpose(x_own, (1, 0)), d_own),)
        return dx_RI, ops.stack(d_weight), zeros_like(ends_E)


def _grouped(x_RI, weight_EIO, ends_E):
    rows, columns = x_RI.shape[0], weight_EIO.shape[2]
    y_RO = zeros_like(ops.matmul(x_RI, weight_EIO[0])) + float("nan")
    for expert in range(weight_EIO.shape[0]):
        own = ops.broadcast_to(_rows_of(expert, rows, ends_E), (rows, columns))
        y_RO = ops.select(own, ops.matmul(x_RI, weight_EIO[expert]), y_RO)
    return y_RO


def _rows_of(expert, rows, ends_E):
    """Which rows are an expert's, (R, 1)."""
    number_R = Tensor(np.arange(rows))
    own_R = number_R < ends_E[expert]
    if expert > 0:
        own_R = ops.logical_and(own_R, number_R >= ends_E[expert - 1])
    return ops.expand_dims(own_R, 1)


def flash_attention_score(  # noqa: PLR0913, PLR0917 - the operator's
    query,
    key,
    value,
    head_num,
    real_shift=None,
    drop_mask=None,
    padding_mask=None,
    attn_mask=None,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    keep_prob=1.0,
    scalar_value=1.0,
    pre_tokens=2147483647,
    next_tokens=2147483647,
    inner_precise=0,
    input_layout="BSH",
    sparse_mode=0,
):
    """Attention with the documented masks, for the layouts BSH and TND."""
    require(query.dtype == key.dtype == value.dtype, "query, key and value of one dtype")
    require(key.shape == value.shape, "value has key's shape")
    require(attn_mask is None or attn_mask.dtype == mstype.bool_, "attn_mask is bool or uint8")
    if sparse_mode in (CAUSAL, RIGHT_DOWN, BAND):
        require(attn_mask.shape == (2048, 2048), "modes 2, 3 and 4 take the (2048, 2048) mask")
    if input_layout == "TND":
        return _attend_samples(
            query, key, value, head_num, actual_seq_qlen, actual_seq_kvlen, scalar_value,
            pre_tokens, next_tokens, sparse_mode,
        )  # fmt: skip
    require(input_layout == "BSH", "the emulation knows BSH and TND")
    require(actual_seq_qlen is None, "only TND has lengths")
    batch, queries, width = query.shape
    head_dim = width // head_num
    require(head_dim % 16 == 0 and head_dim <= 512, "head_dim is a multiple of 16, at most 512")
    hidden = _hidden_mask(
        sparse_mode, attn_mask, queries, key.shape[1], head_num, pre_tokens, next_tokens
    )
    heads = [
        ops.transpose(ops.reshape(x, (*x.shape[:2], -1, head_dim)), (0, 2, 1, 3))
        for x in (query, key, value)
    ]
    out_BNSd = _attend(*heads, hidden, scalar_value)
    return ops.reshape(ops.transpose(out_BNSd, (0, 2, 1, 3)), (batch, queries, width))


def _hidden_mask(mode, mask, queries, keys, head_num, pre_tokens, next_tokens):
    """(S, W) or what was given, True where a query must not see a key."""
    if mode == WHOLE:
        require(
            mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] in (1, head_num)),
            "mode 1 takes (S, W), (B, 1, S, W) or (B, N, S, W)",
        )
        require(mask.shape[-2:] == (queries, keys), "mode 1 takes the whole mask")
        return mask
    require(mode in (CAUSAL, RIGHT_DOWN, BAND), f"sparse_mode {mode} is not emulated")
    # distance of a query from a key, counted from the upper left or the lower right corner
    offset = 0 if mode == CAUSAL else keys - queries
    distance = np.arange(queries)[:, None] + offset - np.arange(keys)[None, :]
    if mode == RIGHT_DOWN:
        require(queries <= keys, "mode 3 has no more queries than keys")
    if mode == BAND:
        require(queries == keys, "mode 4 is only documented for as many keys as queries")
        return Tensor((distance > pre_tokens) | (-distance > next_tokens))
    return Tensor(distance < 0)


def _attend(q_BNSd, k_BKWd, v_BKWd, hidden, scale):
    groups = q_BNSd.shape[1] // k_BKWd.shape[1]
    keys = ops.repeat_interleave(k_BKWd, groups, 1)
    values = ops.repeat_interleave(v_BKWd, groups, 1)
    scores = ops.cast(ops.matmul(q_BNSd, ops.transpose(keys, (0, 1, 3, 2))), mstype.float32) * scale
    scores = ops.masked_fill(scores, hidden, Tensor(-1e30, mstype.float32))
    return ops.matmul(ops.cast(ops.softmax(scores, -1), values.dtype), values)


def _attend_samples(  # noqa: PLR0913, PLR0917 - the operator's
    query, key, value, head_num, q_ends, kv_ends, scale, pre_tokens, next_tokens, mode
):
    """TND: samples behind each other, given by their ends."""
    (tokens, heads, head_dim), keys = query.shape, key.shape[0]
    require(heads == head_num and head_dim % 16 == 0, "TND is (T, N, d), d a multiple of 16")
    require(mode in (CAUSAL, RIGHT_DOWN), "TND has modes 2 and 3")
    require(next_tokens == 0 and pre_tokens >= tokens, "TND has next_tokens 0 and all pre_tokens")
    require(q_ends.shape == kv_ends.shape and q_ends.shape[0] <= 1024, "at most 1024 samples")
    if mindspore.get_context("mode") == mindspore.PYNATIVE_MODE:
        _require_ends(q_ends.asnumpy(), kv_ends.asnumpy(), tokens, keys, mode)
    of_query, before_end_q = _samples(q_ends, tokens)
    of_key, before_end_k = _samples(kv_ends, keys)
    other = ops.not_equal(ops.expand_dims(of_query, 1), ops.expand_dims(of_key, 0))
    later = ops.expand_dims(before_end_q, 1) > ops.expand_dims(before_end_k, 0)
    q, k, v = (ops.expand_dims(ops.transpose(x, (1, 0, 2)), 0) for x in (query, key, value))
    out_BNTd = _attend(q, k, v, ops.logical_or(other, later), scale)
    return ops.transpose(out_BNTd[0], (1, 0, 2))


def _require_ends(q_ends, kv_ends, tokens, keys, mode):
    q_lengths, kv_lengths = np.diff(q_ends, prepend=0), np.diff(kv_ends, prepend=0)
    require((q_lengths > 0).all() and (kv_lengths > 0).all(), "no sample is empty")
    require((q_ends[-1], kv_ends[-1]) == (tokens, keys), "the last ends are T1 and T2")
    if mode == RIGHT_DOWN:
        require((q_lengths <= kv_lengths).all(), "mode 3: no more queries than keys in a sample")
    else:
        require((q_lengths == kv_lengths).all(), "the emulation knows mode 2 for equal lengths")


def _samples(ends, tokens):
    """Of each token its sample, and how many of the sample follow it."""
    number_T = Tensor(np.arange(tokens))
    passed = ops.expand_dims(number_T, 1) >= ops.expand_dims(ends, 0)
    sample_T = ops.reduce_sum(ops.cast(passed, mstype.int32), 1)
    return sample_T, ops.gather(ends, sample_T, 0) - number_T
