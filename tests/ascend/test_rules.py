"""Every rule and every operator's contract finds what it is for, on made-up nodes."""

import dataclasses

import pytest
from ascend.graph_cases import GRAPH_CASES
from ascend.graph_contracts import KNOWN, RULES, CompiledGraph, broken_by, known_of
from ascend.operator_contracts import OPERATORS

from mixtral_ms.graphs.graph_facts import Constant
from mixtral_ms.graphs.typed_graph import Node, TensorType, TypedGraph


def tensor(dtype, *shape):
    return TensorType(dtype, shape)


def node(primitive, inputs=(), outputs=(), arguments=None, attributes=""):
    """`inputs` are tensors, tuples of tensors, or arguments as the IR writes them."""
    given = tuple(
        (one,) if isinstance(one, TensorType) else () if isinstance(one, str) else tuple(one)
        for one in inputs
    )
    written = tuple(one if isinstance(one, str) else "%1" for one in inputs)
    return Node(primitive, arguments or written, given, tuple(outputs), attributes, "x.py:1")


BF16 = [tensor("BFloat16", 6, 8), tensor("BFloat16", 4, 8, 5)]
MASK = tensor("Bool", 2048, 2048)


def grouped(x=BF16[0], weight=BF16[1], groups=tensor("Int64", 4), kind="I64(0)"):  # noqa: B008
    none, tail = ["None"] * 5, ["I64(3)", kind, "Bool(0)", "Bool(0)"]
    tail[2:] = ["I64(0)", "I64(0)"]
    return node("GroupedMatmul", [(x,), (weight,), *none, groups, *tail])


def attention(query="BFloat16", mask=MASK, mode=2, width=64, lengths="None", layout=0):
    q, k = tensor(query, 1, 80, width), tensor(query, 1, 80, width // 2)
    numbers = ["I64(4)", "F32(1)", "F32(0.25)", "I64(80)", "I64(0)", "I64(0)"]
    numbers += [f"I64({layout})", f"I64({mode})"]
    rest = ["None", "None", "None", mask or "None", "None", lengths, lengths, *numbers]
    return node("FlashAttentionScore", [q, k, k, *rest], [q])


def exchange(x=tensor("BFloat16", 64), counts=tensor("Int64", 2)):  # noqa: B008
    attributes = 'primitive_attrs: {group: "ranks_0_1", block_size: I64(8)}'
    return node("AlltoAllV", [x, counts, counts], [tensor("BFloat16", -1)], attributes=attributes)


def equal_exchange(x=tensor("BFloat16", 8, 6), result=None, ranks="ranks_0_1"):  # noqa: B008
    numbers = "split_dim: I64(0), concat_dim: I64(0), split_count: I64(2)"
    attributes = f'primitive_attrs: {{group: "{ranks}", {numbers}}}'
    return node("AlltoAll", [x], [result or x], attributes=attributes)


def adamw(gradient="Float32", moment="Float32", step=tensor("Float32", 1)):  # noqa: B008
    var, second = tensor("Float32", 4, 6), tensor("Float32", 4, 6)
    moments = [tensor(moment, 4, 6), second, second]
    return node("AdamW", [var, *moments, tensor(gradient, 4, 6), step, *["F32(0.1)"] * 5])


GOOD = [
    adamw(),
    equal_exchange(),
    grouped(),
    attention(),
    attention(mode=0, mask=tensor("Bool", 1, 1, 80, 80)),
    exchange(),
]
BAD = {
    "a 16 bit gradient of a float32 weight": adamw(gradient="BFloat16"),
    "moments of two dtypes": adamw(moment="Float16"),
    "bfloat16 moments": adamw(moment="BFloat16"),
    "an int32 step": adamw(step=tensor("Int32", 1)),
    "weights of another dtype": grouped(weight=tensor("Float32", 4, 8, 5)),
    "int32 groups": grouped(groups=tensor("Int32", 4)),
    "groups of other experts": grouped(groups=tensor("Int64", 3)),
    "widths that differ": grouped(x=tensor("BFloat16", 6, 9)),
    "a group_type without gradient": grouped(kind="I64(-1)"),
    "float32 queries": attention(query="Float32"),
    "a float mask": attention(mask=tensor("Float32", 2048, 2048)),
    "a whole mask for a causal mode": attention(mask=tensor("Bool", 1, 1, 80, 80)),
    "a small mask for a whole mode": attention(mode=0),
    "a mode that is not implemented": attention(mode=7),
    "no mask": attention(mask=None, mode=0),
    "narrow heads": attention(width=32),
    "lengths without TND": attention(lengths="%9"),
    "rows that are not flat": exchange(x=tensor("BFloat16", 8, 8)),
    "broken blocks": exchange(x=tensor("BFloat16", 65)),
    "blocks that do not divide": equal_exchange(x=tensor("BFloat16", 7, 6)),
    "blocks for other ranks": equal_exchange(ranks="ranks_0_1_2_3"),
    "blocks that grow": equal_exchange(result=tensor("BFloat16", 16, 6)),
    "a copy of another shape": node("TensorMove", [tensor("Int32", 4)], [tensor("Int32", 5)]),
    "a table as a tuple": node("TensorToTuple", [tensor("Int64", 2, 2)]),
    "int32 counts": exchange(counts=tensor("Int32", 2)),
    "counts of other ranks": exchange(counts=tensor("Int64", 3)),
    "gamma of another dtype": node(
        "RmsNorm", [tensor("BFloat16", 2, 8), tensor("Float32", 8), "F32(1e-05)"]
    ),
    "tables of another dtype": node(
        "RotaryPositionEmbedding",
        [tensor("BFloat16", 1, 80, 4, 16), *[tensor("Float32", 1, 80, 1, 16)] * 2, "I64(0)"],
    ),
    "tables of other heads": node(
        "RotaryPositionEmbedding",
        [tensor("Float32", 1, 80, 4, 16), *[tensor("Float32", 1, 80, 2, 16)] * 2, "I64(0)"],
    ),
    "no halves": node("Swiglu", [tensor("BFloat16", 4, 7), "I64(-1)"]),
    "a gradient of another half": node(
        "SwigluGrad", [tensor("BFloat16", 4, 3), tensor("BFloat16", 4, 8), "I64(-1)"]
    ),
    "no epsilon": node("RmsNorm", [tensor("Float32", 2, 8), tensor("Float32", 8), "F32(0)"]),
    "bfloat16 in order": node("TopK", [tensor("BFloat16", 4, 8), "I64(2)"]),
    "int64 summed up": node("CumSum", [tensor("Int64", 4), "I64(0)"]),
    "dtypes that differ": node("Add", [tensor("Float32", 4), tensor("BFloat16", 4)]),
    "a product of float64": node("MatMul", [tensor("Float64", 4, 4), tensor("Float64", 4, 4)]),
    "axes that differ": node("BatchMatMul", [tensor("Float32", 2, 4, 4), tensor("Float32", 4, 4)]),
    "a sum of bools": node("AllReduce", [tensor("Bool", 4)], [tensor("Bool", 4)]),
    "float indices": node("Gather", [tensor("Float32", 4), tensor("Float32", 2), "I64(0)"]),
    "a mask of numbers": node("MaskedFill", [tensor("Float32", 4), tensor("Int32", 4), "%3"]),
    "a choice by numbers": node("Select", [tensor("Int32", 4), *[tensor("Float32", 4)] * 2]),
    "a sum of another dtype": node("AssignAdd", [tensor("Float32", 4), tensor("BFloat16", 4)]),
}


@pytest.mark.parametrize("one", GOOD, ids=lambda one: one.primitive)
def test_contracts_accept_what_is_documented(one):
    assert list(OPERATORS[one.primitive](one)) == []


@pytest.mark.parametrize("what", BAD)
def test_contracts_refuse(what):
    assert list(OPERATORS[BAD[what].primitive](BAD[what])) != []


def compiled(*nodes, parameters=(), **facts):
    given = {f"layers.0.ffn.w{i}.weight": one for i, one in enumerate(parameters, 1)}
    return CompiledGraph(TypedGraph(given, (attention(), *nodes), ()), **facts)


SQUARE = tensor("Float32", 1, 4, 80, 80)

GRAPHS = {
    "operators_are_known": compiled(node("Nonsense")),
    "operators_get_what_they_document": compiled(BAD["int32 counts"]),
    "no_float64": compiled(node("Cast", [tensor("Float32", 1)], [tensor("Float64", 1)])),
    "no_large_constant": compiled(
        node("Split", arguments=("Tensor(shape=[1, 32768, 4096], dtype=BFloat16, value=[...])",))
    ),
    "no_square_constant": compiled(held=(Constant(6400, "Bool", (80, 80), "Cell.mask"),)),
    "no_square_tensor": compiled(node("Softmax", [SQUARE], [SQUARE])),
    "flash_attention_in_every_layer": compiled(layers=2),
    "expert_weights_are_not_copied_transposed": compiled(
        node("Transpose", [tensor("BFloat16", 4, 48, 64)]),
        parameters=[tensor("Float32", 4, 48, 64)],
    ),
    "experts_are_working_weights": compiled(
        parameters=[tensor("Float32", 4, 48, 64)], working=True
    ),
    "sizes_are_known": compiled(exchange(), drops=True),
}


def test_a_good_graph_breaks_nothing():
    view = node("TransposeExtView", [tensor("BFloat16", 4, 48, 64)])
    good = compiled(view, exchange(), parameters=[tensor("Float32", 4, 48, 64)])
    assert broken_by(good) == {}


def test_what_is_square():
    rule = RULES["no_square_tensor"]
    for dtype, shape, wrong in (
        ("Bool", (1, 80, 80), True),
        ("BFloat16", (1, 80, 80), False),  # hidden states as wide as they are long
        ("Float32", (1, 4, 40, 40), True),  # the first part of a split sequence sees itself alone
        ("Float32", (1, 4, 40, 80), True),
        ("Float32", (1, 4, 80, 16), False),
    ):
        one = compiled(node("Any", (), [tensor(dtype, *shape)]), part=40)
        assert bool(list(rule(one))) == wrong, (dtype, shape)


@pytest.mark.parametrize("rule", GRAPHS)
def test_rules_find_what_they_are_for(rule):
    assert set(broken_by(GRAPHS[rule])) == {rule}


def test_recomputed_layers_attend_twice():
    backward = Node("FlashAttentionScoreGrad", (), (), (), "", "")
    graph = TypedGraph({}, (attention(), attention(), backward), ())
    good = CompiledGraph(graph, "forward and backward", recompute=True)
    rule = RULES["flash_attention_in_every_layer"]
    assert list(rule(good)) == []
    assert list(rule(dataclasses.replace(good, recompute=False))) != []


def test_layers_are_computed_again_when_the_one_behind_went_back():
    def graph(input_of_second):
        attends, returns = "FlashAttentionScore", "FlashAttentionScoreGrad"
        of = [(attends, "%1"), (returns, "%2"), ("Depend", "%1, %3"), (attends, input_of_second)]
        nodes = [
            Node(primitive, (reads,), (), (), "", "", f"%{number}")
            for number, (primitive, reads) in enumerate(of, 2)
        ]
        return TypedGraph({}, tuple(nodes), ())

    rule = RULES["layers_are_computed_again_one_by_one"]
    for name, wrong in (("%4", False), ("%1", True)):
        one = CompiledGraph(graph(name), "forward and backward", layers=2, layer_inputs=True)
        assert bool(list(rule(one))) == wrong, name


def test_every_rule_has_a_graph_that_breaks_it():
    assert RULES.keys() - GRAPHS.keys() == {"layers_are_computed_again_one_by_one"}


def test_what_is_known_is_of_rules_and_cases_that_are_there():
    graphs = ("forward and backward", "forward", "evaluation", "sample answers")
    graphs += ("prefill", "prefill, cached keys", "decode")
    assert {one.rule for one in KNOWN} <= RULES.keys()
    for one in KNOWN:
        hit = [
            case for case in GRAPH_CASES for graph in graphs if one.rule in known_of(case, graph)
        ]
        assert hit, one
