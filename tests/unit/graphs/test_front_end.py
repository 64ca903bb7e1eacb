"""What the front end says when it cannot work, and where errors come from."""

import inspect

import mindspore.common.api
import pytest

from mixtral_ms.graphs import front_end
from mixtral_ms.graphs.front_end import FrontEnd, FrontEndUnusableError, GraphError
from mixtral_ms.graphs.typed_graph import PACKAGE

TRACE = f"""\
For 'MatMul', the input's shape is wrong.

----------------------------------------------------
- The Traceback of Net Construct Code:
----------------------------------------------------
# 0 In file {PACKAGE}/model/mixtral.py:245, 15~24
        hidden = self.model(ids)
# 1 In file {PACKAGE}/kernels/cells/experts.py:31, 15~30
        return self.product(x, w)
# 2 In file /usr/lib/mindspore/ops/math_func.py:8462, 11~49
    return matmul(input, other)
"""


def test_errors_name_lines_of_this_package():
    error = GraphError(ValueError(TRACE))
    assert str(error) == "ValueError: For 'MatMul', the input's shape is wrong."
    assert error.lines == [
        "mixtral_ms/model/mixtral.py:245",
        "mixtral_ms/kernels/cells/experts.py:31",
    ]


def test_the_first_line_that_tells_something():
    banner = "-----\n- Framework Unexpected Exception Raised:\n-----\nThis is a bug.\n"
    assert str(GraphError(RuntimeError(banner))) == "RuntimeError: This is a bug."
    assert str(GraphError(RuntimeError(""))) == "RuntimeError: "


def test_a_version_without_the_interface(monkeypatch, tmp_path):
    monkeypatch.delattr(mindspore.common.api, "_cell_graph_executor")
    with pytest.raises(FrontEndUnusableError, match=mindspore.__version__):
        FrontEnd(tmp_path)


def test_a_version_with_another_interface(monkeypatch, tmp_path):
    class Executor:
        def compile(self, cell, *inputs, phase, jit_config_dict):
            """As some later version may have it."""

    monkeypatch.setattr(mindspore.common.api, "_cell_graph_executor", Executor())
    with pytest.raises(FrontEndUnusableError, match="do_convert"):
        FrontEnd(tmp_path)


def test_a_version_that_writes_no_graphs(monkeypatch, tmp_path):
    class Executor:
        def compile(self, cell, *inputs, phase, do_convert, jit_config_dict):
            """Writes nothing."""

    monkeypatch.setattr(mindspore.common.api, "_cell_graph_executor", Executor())
    with pytest.raises(FrontEndUnusableError, match="wrote none of"):
        FrontEnd(tmp_path)


def test_the_installed_version_has_the_interface():
    assert set(inspect.signature(front_end._executor().compile).parameters) >= front_end._NEEDED
