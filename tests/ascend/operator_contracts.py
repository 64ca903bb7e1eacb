"""What the documentation of each Ascend operator asks of its inputs, as checks of a typed node.

By the docstrings of MindSpore 2.7.2 (`mindspore/ops`); where they are silent, by those of CANN's
operator that MindSpore calls, and the comment says so. OPERATORS is also the list of operators that
may be used at all: one that is not in it was not looked up.

A check yields what is wrong. Legend: B batch, S1, S2 sequences of queries and of keys, N1, N2 their
heads, D width of a head, T tokens, M rows, E experts.
"""

import re
from collections.abc import Callable, Iterator

from mixtral_ms.graphs.typed_graph import Node, TensorType

Check = Callable[[Node], Iterator[str]]

FLOATS = ("Float16", "BFloat16", "Float32")
NUMBERS = (*FLOATS, "Int32", "Int64")
ANYTHING = (*NUMBERS, "Bool", "Int8", "UInt8")
INDICES = ("Int32", "Int64")
MASK_SIDE = 2048


def number(text: str) -> float:
    """Of an argument such as `I64(3)` or `F32(0.5)`."""
    return float(re.search(r"\((.*)\)", text)[1])


def tensors(node: Node) -> list[TensorType]:
    """All tensors that a node is given."""
    return [one for argument in node.inputs for one in argument]


def dtypes(*allowed: str) -> Check:
    """Every tensor has one of these."""

    def check(node: Node) -> Iterator[str]:
        for one in tensors(node):
            if one.dtype not in allowed:
                yield f"{one.dtype} is none of {', '.join(allowed)}"

    return check


def alike(*allowed: str) -> Check:
    """All tensors have the same dtype, one of these."""

    def check(node: Node) -> Iterator[str]:
        yield from dtypes(*allowed)(node)
        if len(found := {one.dtype for one in tensors(node)}) > 1:
            yield f"dtypes differ: {', '.join(sorted(found))}"

    return check


def with_indices(place: int, *allowed: str, of: tuple[str, ...] = INDICES) -> Check:
    """One argument holds indices, the other tensors have one of the dtypes."""

    def check(node: Node) -> Iterator[str]:
        if node.inputs[place][0].dtype not in of:
            yield f"indices are {node.inputs[place][0].dtype}, not {' or '.join(of)}"
        others = [one for at, given in enumerate(node.inputs) if at != place for one in given]
        for one in others:
            if one.dtype not in allowed:
                yield f"{one.dtype} is none of {', '.join(allowed)}"

    return check


def matmul(node: Node) -> Iterator[str]:
    """MatMul: two matrices of one dtype, no float64."""
    yield from alike(*FLOATS)(node)
    for one in tensors(node):
        if len(one.shape) != 2:
            yield f"{list(one.shape)} has {len(one.shape)} axes, not 2"


def batch_matmul(node: Node) -> Iterator[str]:
    """BatchMatMul: as many axes in both, at least 2."""
    yield from alike(*FLOATS)(node)
    x, y = tensors(node)
    if len(x.shape) != len(y.shape) or len(x.shape) < 2:
        yield f"{list(x.shape)} and {list(y.shape)} differ in axes"


def grouped_matmul(node: Node) -> Iterator[str]:
    """GroupedMatmul(x, weight, five of None, group_list, split_item, group_type, transposes).

    bfloat16 is CANN's (aclnnGroupedMatmulV4), the docstring does not name it. group_type 2 (rows of
    the weights' gradient) is what MindSpore's own backward gives.
    """
    x, weight = node.inputs[0], node.inputs[1]
    if (len(x), len(weight)) != (1, 1):
        yield f"{len(x)} inputs and {len(weight)} weights: split_item 3 takes one of each"
        return
    (x,), (weight,), (groups,) = x, weight, node.inputs[7]
    if x.dtype != weight.dtype or x.dtype not in FLOATS:
        yield f"x {x.dtype}, weight {weight.dtype}: the same of {', '.join(FLOATS)}"
    if any(one != "None" for one in node.arguments[2:7]):
        yield "bias, scale, offset and their like have no gradient"
    if groups.dtype != "Int64" or len(groups.shape) != 1:
        yield f"group_list is {groups.dtype} {list(groups.shape)}, not Int64 with one axis"
    if [number(one) for one in node.arguments[10:12]] != [0, 0]:
        yield "transpose_a and transpose_b have no gradient"
    split_item, group_type = (number(one) for one in node.arguments[8:10])
    if split_item != 3 or group_type not in (0, 2):
        yield f"split_item {split_item:g} with group_type {group_type:g} has no gradient"
    experts_fit = group_type == 2 or weight.shape[:1] == groups.shape
    if len(x.shape) != 2 or len(weight.shape) != (3 if group_type == 0 else 2) or not experts_fit:
        yield f"x {list(x.shape)}, weight {list(weight.shape)}, groups {list(groups.shape)}"
    elif x.shape[1] != weight.shape[-2]:
        yield f"x {list(x.shape)} does not multiply {list(weight.shape)}"


def flash_attention(node: Node) -> Iterator[str]:
    """FlashAttentionScore.

    Its arguments are query, key, value, real_shift, drop_mask, padding_mask, attn_mask, prefix,
    actual_seq_qlen, actual_seq_kvlen, head_num, keep_prob, scale_value, pre_tokens, next_tokens,
    inner_precise, input_layout and sparse_mode.
    """
    query, key, value = (node.inputs[place][0] for place in range(3))
    heads, keep, _, _, _, _, layout, mode = (number(one) for one in node.arguments[10:18])
    yield from _attention(query, key, value, heads, layout)
    yield from _attention_mask(node, node.inputs[6], query, key, mode)
    if keep == 1 and node.arguments[4] != "None":
        yield "keep_prob 1 takes no drop_mask"
    lengths = [one != "None" for one in node.arguments[8:10]]
    if lengths != [layout == _TND] * 2:
        yield "actual_seq_qlen and actual_seq_kvlen are for TND, and TND needs both"
    if layout == _TND and mode not in (2, 3):
        yield f"TND takes sparse_mode 2 or 3, not {mode:g}"


def flash_attention_grad(node: Node) -> Iterator[str]:
    """FlashAttentionScoreGrad: as the forward, with dy behind the values and results behind."""
    query, key, value, dy = (node.inputs[place][0] for place in range(4))
    heads, _, _, _, _, _, layout, mode = (number(one) for one in node.arguments[15:23])
    if dy.dtype != query.dtype or dy.shape != query.shape:
        yield f"dy {dy} is not like the query {query}"
    yield from _attention(query, key, value, heads, layout)
    yield from _attention_mask(node, node.inputs[7], query, key, mode)


_BSH, _TND = 0, 4  # input_layout as the IR writes it


def _attention(
    query: TensorType, key: TensorType, value: TensorType, heads: float, layout: float
) -> Iterator[str]:
    if {query.dtype, key.dtype, value.dtype} not in ({"Float16"}, {"BFloat16"}):
        yield f"{query.dtype}, {key.dtype}, {value.dtype}: all float16 or all bfloat16"
    if key.shape != value.shape or len(query.shape) != 3:
        yield f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        return
    if layout not in (_BSH, _TND):
        yield f"input_layout {layout:g} was not looked up"
        return
    if layout == _TND:
        width, key_heads = query.shape[2], key.shape[1]
    else:
        width, key_heads = query.shape[2] / heads, key.shape[2] * heads / query.shape[2]
        if query.shape[0] != key.shape[0]:
            yield f"batches differ: {query.shape[0]} and {key.shape[0]}"
    if width % 16 or width > 512:
        yield f"a head is {width:g} wide: a multiple of 16, at most 512"
    if not 1 <= heads <= 256 or key_heads < 1 or heads % key_heads:
        yield f"{heads:g} heads for {key_heads:g} of keys: at most 256, and a multiple"


def _attention_mask(
    node: Node, mask: tuple[TensorType, ...], query: TensorType, key: TensorType, mode: float
) -> Iterator[str]:
    if not mask:
        yield f"sparse_mode {mode:g} without a mask" if mode else "no mask: not causal"
        return
    (mask,) = mask
    if mask.dtype not in ("Bool", "UInt8"):
        yield f"the mask is {mask.dtype}, not bool or uint8"
    whole = (query.shape[1], key.shape[1])
    if mode in (2, 3, 4):
        if mask.shape != (MASK_SIDE, MASK_SIDE):
            yield f"sparse_mode {mode:g} takes a mask of 2048 x 2048, not {list(mask.shape)}"
    elif mode not in (0, 1):
        yield f"sparse_mode {mode:g} is not implemented"
    elif mask.shape[-2:] != whole or len(mask.shape) not in (2, 4):
        yield f"sparse_mode {mode:g} takes a mask of {whole}, not {list(mask.shape)}"
    places = slice(13, 15) if node.primitive == "FlashAttentionScore" else slice(18, 20)
    before, after = (number(one) for one in node.arguments[places])
    if mode in (0, 4) and (before < 0 or after < 0):
        yield f"pre_tokens {before:g}, next_tokens {after:g}: the band must hold something"


def rms_norm(node: Node) -> Iterator[str]:
    """RmsNorm(x, gamma, epsilon): one dtype, gamma with at most as many axes."""
    yield from alike(*FLOATS)(node)
    x, gamma = tensors(node)
    if len(gamma.shape) > len(x.shape) or x.shape[len(x.shape) - len(gamma.shape) :] != gamma.shape:
        yield f"gamma {list(gamma.shape)} for x {list(x.shape)}"
    if not 0 < number(node.arguments[2]) <= 1:
        yield f"epsilon {node.arguments[2]}: above 0, at most 1"


def rotary_position_embedding(node: Node) -> Iterator[str]:
    """RotaryPositionEmbedding(x, cos, sin, mode), and its gradient with dy for x.

    x as in the documentation's example (B, S, N, D); the tables 1S1D, BS1D or BSND.
    """
    yield from alike(*FLOATS)(node)
    x, *tables = tensors(node)
    for one in (x, *tables):
        if len(one.shape) != 4:
            yield f"{list(one.shape)} has not 4 axes"
            return
    if number(node.arguments[-1]) != 0:
        yield f"mode {node.arguments[-1]} turns neighbours, not halves"
    batch, length, heads, width = x.shape
    if width % 2 or width >= 896 or max(batch, heads) >= 1000:
        yield f"{list(x.shape)}: D even and below 896, B and N below 1000"
    for one in tables:
        allowed = ((1, batch), (length,), (1, heads), (width,))
        if any(size not in sizes for size, sizes in zip(one.shape, allowed, strict=True)):
            yield f"a table {list(one.shape)} for {list(x.shape)}"


def swiglu(node: Node) -> Iterator[str]:
    """Swiglu(input, dim): the axis divides by 2."""
    (x,) = tensors(node)
    yield from dtypes(*FLOATS)(node)
    if x.shape[int(number(node.arguments[1]))] % 2:
        yield f"{list(x.shape)} has no halves along {node.arguments[1]}"


def swiglu_grad(node: Node) -> Iterator[str]:
    """SwigluGrad(grad_output, input, dim): as the forward, with half as much of a gradient."""
    yield from alike(*FLOATS)(node)
    dy, x = tensors(node)
    axis = int(number(node.arguments[2]))
    if dy.shape[axis] * 2 != x.shape[axis]:
        yield f"dy {list(dy.shape)} for {list(x.shape)}"


def all_to_all_v(node: Node) -> Iterator[str]:
    """AlltoAllV(input_x, send_numel_list, recv_numel_list): flat, counts of whole blocks."""
    (x,), *counts = node.inputs
    block = int(number(node.attribute("block_size")))
    ranks = node.attribute("group").count("_")
    yield from communicated(node, x)
    if len(x.shape) != 1 or x.shape[0] % block:
        yield f"{list(x.shape)} is not flat blocks of {block}"
    for one in (one for given in counts for one in given):
        if (one.dtype, one.shape) != ("Int64", (ranks,)):
            yield f"counts are {one.dtype} {list(one.shape)}, not Int64 [{ranks}]"


def all_to_all(node: Node) -> Iterator[str]:
    """AlltoAll: split_dim divides by split_count, the number of ranks; concat_dim grows by it."""
    (x,), ranks = tensors(node), node.attribute("group").count("_")
    yield from communicated(node, x)
    count, split, concat = (
        int(number(node.attribute(name))) for name in ("split_count", "split_dim", "concat_dim")
    )
    if count != ranks or x.shape[split] % count:
        yield f"{list(x.shape)} is split {count} times along {split} for {ranks} ranks"
    shape = list(x.shape)
    shape[split] //= count
    shape[concat] *= count
    if node.outputs[0].shape != tuple(shape):
        yield f"{list(x.shape)} -> {list(node.outputs[0].shape)}, not {shape}"


def tensor_to_tuple(node: Node) -> Iterator[str]:
    """TensorToTuple: of one axis; it is computed by the host, on any platform."""
    for one in tensors(node):
        if len(one.shape) != 1:
            yield f"{list(one.shape)} has not one axis"


def tensor_move(node: Node) -> Iterator[str]:
    """TensorMove has no docstring: MindSpore's own passes put it where a copy must be kept."""
    if tuple(tensors(node)) != node.outputs:
        yield f"{tensors(node)} -> {node.outputs}"


def communicated(node: Node, x: TensorType) -> Iterator[str]:
    """What HCCL sends: no bool, no float64."""
    if x.dtype not in (*NUMBERS, "Int8", "UInt8"):
        yield f"{node.primitive} of {x.dtype}"


def adamw(node: Node) -> Iterator[str]:
    """AdamW: var, m, v, max_v, gradient, step, then numbers; float16 or float32."""
    var, *moments, gradient, step = tensors(node)
    for one in (var, *moments):
        if one.dtype not in ("Float16", "Float32") or one.shape != var.shape:
            yield f"{one} beside {var}"
    if len({one.dtype for one in moments}) > 1:
        yield f"moments of {moments}"
    if gradient != var:
        yield f"gradient {gradient} of {var}"
    if step != TensorType("Float32", (1,)):  # as mint.optim.AdamW gives it
        yield f"step {step}"


def all_reduce(node: Node) -> Iterator[str]:
    """AllReduce: HCCL sums int8 to int64, float16, bfloat16 and float32."""
    (x,) = tensors(node)
    yield from communicated(node, x)
    if node.outputs != (x,):
        yield f"{x} -> {node.outputs}"


def all_gather(node: Node) -> Iterator[str]:
    """AllGather: (x1, ...) -> (N x1, ...)."""
    (x,), ranks = tensors(node), node.attribute("group").count("_")
    yield from communicated(node, x)
    if node.outputs[0].shape != (x.shape[0] * ranks, *x.shape[1:]):
        yield f"{list(x.shape)} of {ranks} ranks -> {list(node.outputs[0].shape)}"


def reduce_scatter(node: Node) -> Iterator[str]:
    """ReduceScatter: axis 0 divides by the number of ranks."""
    (x,), ranks = tensors(node), node.attribute("group").count("_")
    yield from communicated(node, x)
    if x.shape[0] % ranks:
        yield f"{list(x.shape)} does not divide by {ranks}"


def top_k(node: Node) -> Iterator[str]:
    """TopK: on Ascend int8, uint8, int32, int64, float16, float32; no scalar.

    TopkExt (mint.topk) names no dtypes: the same.
    """
    x = node.inputs[0][0]
    if x.dtype not in ("Int8", "UInt8", "Int32", "Int64", "Float16", "Float32"):
        yield f"{x.dtype} cannot be ordered on Ascend"
    if not x.shape:
        yield "a scalar has no largest"


def one_hot(node: Node) -> Iterator[str]:
    """OneHot(indices, depth, on_value, off_value)."""
    yield from with_indices(0, "Int32", "Int64", "Float16", "Float32")(node)
    if node.inputs[2][0].dtype != node.inputs[3][0].dtype:
        yield "on_value and off_value have different dtypes"


def masked_fill(node: Node) -> Iterator[str]:
    """MaskedFill(input_x, mask, value): a bool mask, a number."""
    x, mask = node.inputs[0][0], node.inputs[1][0]
    if x.dtype not in ANYTHING or mask.dtype != "Bool":
        yield f"{x.dtype} with a mask of {mask.dtype}"
    if any(one.shape != () for one in node.inputs[2]):
        yield f"filled with {node.inputs[2]}"


def select(node: Node) -> Iterator[str]:
    """Select(condition, x, y): bool; both of one dtype."""
    condition, *values = tensors(node)
    if condition.dtype != "Bool" or len({one.dtype for one in values}) > 1:
        yield f"{condition.dtype} chooses among {values}"


def assigned(node: Node) -> Iterator[str]:
    """AssignAdd(variable, value): one dtype, one shape."""
    variable, value = tensors(node)[:2]
    if variable != value:
        yield f"{value} is added to {variable}"


def nothing(_: Node) -> Iterator[str]:
    """Moves or makes values of any dtype."""
    return iter(())


_ARITHMETIC = alike(*NUMBERS)
_OF_FLOATS = alike(*FLOATS)
_LOGIC = dtypes("Bool")

OPERATORS: dict[str, Check] = {
    # products
    "MatMul": matmul,
    "BatchMatMul": batch_matmul,
    "GroupedMatmul": grouped_matmul,
    "FlashAttentionScore": flash_attention,
    "FlashAttentionScoreGrad": flash_attention_grad,
    # norms, softmax, activations
    "RmsNorm": rms_norm,
    "RmsNormGrad": dtypes(*FLOATS),
    "RotaryPositionEmbedding": rotary_position_embedding,
    "RotaryPositionEmbeddingGrad": rotary_position_embedding,
    "Swiglu": swiglu,
    "SwigluGrad": swiglu_grad,
    "Softmax": _OF_FLOATS,
    "SoftmaxBackward": _OF_FLOATS,
    "Sigmoid": _OF_FLOATS,
    "SigmoidGrad": _OF_FLOATS,
    "Exp": _OF_FLOATS,
    "Log": _OF_FLOATS,
    "Floor": _OF_FLOATS,
    # between ranks
    "AllReduce": all_reduce,
    "AllGather": all_gather,
    "ReduceScatter": reduce_scatter,
    "AlltoAll": all_to_all,
    "AlltoAllV": all_to_all_v,
    # routing
    "TopK": top_k,
    "TopkExt": top_k,
    "CumSum": dtypes("Int8", "UInt8", "Int32", "Float16", "Float32"),
    "OneHot": one_hot,
    "ScatterNd": with_indices(0, *NUMBERS),
    "ScatterUpdate": with_indices(1, *ANYTHING, of=("Int32",)),
    "Gather": with_indices(1, *ANYTHING),
    "GatherD": with_indices(2, *ANYTHING),
    "GatherDGradV2": with_indices(2, *NUMBERS),
    "UnsortedSegmentSum": with_indices(1, *NUMBERS),
    "ArgMaxWithValue": dtypes("Float16", "Float32"),
    "Argmax": dtypes(*FLOATS),
    "MaskedFill": masked_fill,
    "Select": select,
    # element by element
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Maximum", "Minimum", "FloorDiv"), _ARITHMETIC),
    **dict.fromkeys(("AddN", "Neg", "Square", "Muls"), _ARITHMETIC),
    **dict.fromkeys(("Equal", "NotEqual", "Less", "Greater", "GreaterEqual"), alike(*ANYTHING)),
    **dict.fromkeys(("LogicalAnd", "LogicalOr", "LogicalNot"), _LOGIC),
    "AssignAdd": assigned,
    "AdamW": adamw,
    # sums
    "ReduceSum": dtypes(*NUMBERS),
    "SumExt": dtypes(*NUMBERS, "Bool"),
    "ReduceMax": dtypes(*NUMBERS),
    # shapes
    "TensorToTuple": tensor_to_tuple,
    "TensorMove": tensor_move,
    **dict.fromkeys(("Reshape", "Transpose", "TransposeExtView", "ExpandDims", "Tile"), nothing),
    **dict.fromkeys(("BroadcastTo", "Split", "Unstack", "Slice", "StridedSlice"), nothing),
    **dict.fromkeys(("StridedSliceGrad", "Cast", "ZerosLikeExt"), nothing),
    **dict.fromkeys(("Concat", "Stack"), alike(*ANYTHING)),
}
