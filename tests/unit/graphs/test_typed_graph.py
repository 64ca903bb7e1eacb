"""MindSpore's IR files are read for what they say."""

import pytest

from mixtral_ms.graphs.graph_facts import (
    Collective,
    Constant,
    Dynamic,
    facts_of,
    waits_for_host,
)
from mixtral_ms.graphs.typed_graph import (
    PACKAGE,
    Node,
    TensorType,
    read_typed_graph,
    split_outside,
    tensor_types,
)

IR = f"""\
# IR entry: @1_construct
%para1_x: <Tensor[BFloat16], (4, 8)> : [4, 8]
%para2_counts: <Tensor[Int64], (2)> : [2]
%para3_layers.0.w1.weight: <Ref[Tensor[Float32]], (2, 8, 8), ref_key=w>  :  has_default

subgraph @1_construct() {{
  %0(CNode_1) = Load(%para3_layers.0.w1.weight, UMonad[U])
      : (<Ref[Tensor[Float32]], (2, 8, 8), ref_key=w, is_parameter>, <UMonad, NoShape>) \
-> (<Tensor[Float32], (2, 8, 8)>)
  %1(y) = PrimFunc_Add(%para1_x, Tensor(shape=[4, 8], dtype=BFloat16, value=[...])) \
{{instance name: add}} primitive_attrs: {{output_names: [y]}}
      : (<Tensor[BFloat16], (4, 8)>, <Tensor[BFloat16], (4, 8), value=...>) \
-> (<Tensor[BFloat16], (4, 8)>)
      # In file {PACKAGE}/model/mixtral.py:40~48, 4~9/    def construct(/
      # In file {PACKAGE}/kernels/cells/norms.py:7, 4~9/    y = x + one/
      # In file /usr/lib/mindspore/ops/add.py:3, 4~9/    return add(x, y)/
  %2(sent) = Cast(%para2_counts, I64(35))
      : (<Tensor[Int64], (2)>, <Int64, NoShape>) -> (<Tensor[Int64], (2)>)
  %3(received) = AlltoAllV(%1, %2, %2) primitive_attrs: {{group: "ranks_0_1", block_size: I64(8)}}
      : (<Tensor[BFloat16], (32)>, <Tensor[Int64], (2)>, <Tensor[Int64], (2)>) \
-> (<Tensor[BFloat16], (-1)>)
  %4(again) = AlltoAllV(%1, %para2_counts, (I64(1), I64(3))) primitive_attrs: \
{{group: "ranks_0_1", block_size: I64(8)}}
      : (<Tensor[BFloat16], (32)>, <Tensor[Int64], (2)>, <Tuple[Int64*2], \
TupleShape(NoShape, NoShape)>) -> (<Tensor[BFloat16], (-1)>)
  %5(nothing) = MakeTuple()
      : () -> (<Tuple[], TupleShape()>)
  %6(both) = MakeTuple(%3, %1)
      : (<Tensor[BFloat16], (-1)>, <Tensor[BFloat16], (4, 8)>) \
-> (<Tuple[Tensor[BFloat16]*2], TupleShape((-1), (4, 8))>)
  Return(%6)
      : (<Tuple[Tuple[Tensor[BFloat16]*2],Tensor[Int64]], TupleShape(TupleShape((-1), (4, 8)), ())>)
}}
"""


@pytest.fixture
def graph(tmp_path):
    (tmp_path / "19_validate_0001.ir").write_text(IR, encoding="utf-8")
    return read_typed_graph(tmp_path / "19_validate_0001.ir")


def test_nodes(graph):
    assert [node.primitive for node in graph.nodes] == [
        *("Load", "Add", "Cast", "AlltoAllV", "AlltoAllV", "MakeTuple", "MakeTuple", "Return"),
    ]
    (add,) = graph.of("Add")
    x = TensorType("BFloat16", (4, 8))
    assert add.arguments == ("%para1_x", "Tensor(shape=[4, 8], dtype=BFloat16, value=[...])")
    assert (add.inputs, add.outputs) == (((x,), (x,)), (x,))
    assert list(add.constants()) == [x]
    assert add.line == "mixtral_ms/kernels/cells/norms.py:7"
    exchange = graph.of("AlltoAllV")[0]
    assert (exchange.attribute("group"), exchange.attribute("block_size")) == (
        "ranks_0_1",
        "I64(8)",
    )
    assert (exchange.attribute("nowhere"), exchange.line) == ("", "")


def test_parameters_and_outputs(graph):
    assert graph.parameters["layers.0.w1.weight"] == TensorType("Float32", (2, 8, 8))
    assert set(graph.parameters) == {"x", "counts", "layers.0.w1.weight"}
    rows, x = TensorType("BFloat16", (-1,)), TensorType("BFloat16", (4, 8))
    assert graph.outputs == ((rows, x), (TensorType("Int64", ()),))


def test_facts(graph):
    facts = facts_of(graph)
    assert facts.primitives == {"AlltoAllV": 2, "Add": 1, "Cast": 1}
    assert facts.dynamic == [Dynamic("AlltoAllV", 2, "")]
    # of the second exchange the host knows all counts: they are given, or constants
    assert facts.host_reads == {"AlltoAllV": 1}
    assert facts.constant == Constant(
        64, "BFloat16", (4, 8), "Add mixtral_ms/kernels/cells/norms.py:7"
    )
    assert facts.collectives == [Collective("AlltoAllV", "ranks_0_1", "BFloat16", 2, 2 * 64)]


def test_who_waits_for_the_host():
    ends, numbers = (TensorType("Int64", (4,)),), ()

    def attention(argument, lengths):
        arguments = (*["%1"] * 8, argument, argument)
        return Node("FlashAttentionScore", arguments, (*[()] * 8, lengths, lengths), (), "", "")

    assert waits_for_host(attention("%7", ends))
    assert not waits_for_host(attention("%7", numbers)), "a tuple of numbers is the host's"
    assert not waits_for_host(attention("None", numbers))
    assert not waits_for_host(attention("%para3_ends", ends))
    assert waits_for_host(Node("TensorToTuple", ("%7",), (ends,), (), "", ""))
    assert not waits_for_host(Node("Add", ("%7",), (ends,), (), "", ""))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<Tensor[Bool], ()>", [("Bool", ())]),
        ("<Int64, NoShape>", []),
        ("<None, NoShape>", []),
        ("<Ref[Tensor[Float32]], (3, 4), ref_key=a, is_parameter>", [("Float32", (3, 4))]),
        (
            "<Tuple[Tensor[Int32]*2,Tensor[Float16]], TupleShape((1), (2), (3, 4))>",
            [("Int32", (1,)), ("Int32", (2,)), ("Float16", (3, 4))],
        ),
        (
            "<Tuple[Tuple[Tensor[Int8]],Int64], TupleShape(TupleShape((7)), NoShape)>",
            [("Int8", (7,))],
        ),
        (
            "<Tuple[Tuple[Tensor[Int8]]*2], TupleShape(TupleShape((7)), TupleShape((8)))>",
            [("Int8", (7,)), ("Int8", (8,))],
        ),
        ("<Tuple[Tensor[Int8]*2], DynamicSequence>", [("Int8", (-2,)), ("Int8", (-2,))]),
    ],
)
def test_types(text, expected):
    assert [(one.dtype, one.shape) for one in tensor_types(text)] == expected


@pytest.mark.parametrize(
    "dtype, shape, nbytes",
    [
        ("Bool", (2048, 2048), 1 << 22),
        ("BFloat16", (3, 5), 30),
        ("Float32", (), 4),
        ("Int64", (2, 0), 0),
        ("Float32", (-1, 4), 0),
    ],
)
def test_bytes(dtype, shape, nbytes):
    assert TensorType(dtype, shape).nbytes == nbytes


def test_splitting():
    assert split_outside("(a, b), [c, <d, e>], f") == ["(a, b)", "[c, <d, e>]", "f"]
    assert split_outside("") == []
