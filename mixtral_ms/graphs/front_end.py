"""MindSpore's front end: from a cell and its inputs to the graph, before kernels are chosen."""

import inspect
import os
import re
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore
from mindspore import Tensor, nn

from mixtral_ms.graphs.typed_graph import PACKAGE, TypedGraph, read_typed_graph

_LAST_FILES = ("*validate*.ir", "*symbol_engine_optimizer*.ir")
"""The last files of the front end, the best first; which there are depends on the version."""
_NEEDED = {"phase", "do_convert", "jit_config_dict"}
_TRACE = re.compile(r"In file ([^:\s]+\.py):(\d+)")


class FrontEndUnusableError(RuntimeError):
    """This MindSpore's front end cannot be called in the way that is known here."""


class GraphError(Exception):
    """A graph that cannot be built.

    Attributes:
        lines: `file.py:12` of this package that it passed through, the innermost last.
        text: all that MindSpore says.
    """

    def __init__(self, error: Exception) -> None:
        self.text = str(error)
        super().__init__(f"{type(error).__name__}: {_telling_line(self.text)}")
        self.lines = list(dict.fromkeys(_own_lines(error)))


class FrontEnd:
    """Compiles one graph after the other, as one process of a run does.

    Args:
        folder: where MindSpore writes graphs: MS_DEV_SAVE_GRAPHS_PATH since before its import.

    Raises:
        FrontEndUnusableError: it cannot, whatever the graph.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._executor = _executor()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
        try:
            graph = self.compile(_Negative(), [Tensor(1.0, mindspore.float32)])
        except (GraphError, OSError, ValueError) as error:
            raise FrontEndUnusableError(
                f"MindSpore {mindspore.__version__} does not compile a graph without a device as "
                f"2.7.2 does: {error}"
            ) from error
        if not graph.of("Neg"):
            raise FrontEndUnusableError(
                f"graphs that MindSpore {mindspore.__version__} writes cannot be read as those of "
                "2.7.2"
            )

    def compile(
        self, cell: nn.Cell, inputs: Sequence[Tensor | None], keep: Path | None = None
    ) -> TypedGraph:
        """The graph after the last pass of the front end.

        Args:
            cell: what is compiled.
            inputs: of the types and shapes that it will get.
            keep: where MindSpore's file of the graph is copied to.

        Raises:
            GraphError: it cannot be built.
        """
        before = set(self._folder.rglob("*.ir"))
        try:
            # the phase's name ends the work before kernels are chosen
            self._executor.compile(
                cell, *inputs, phase="export.mindir", do_convert=False, jit_config_dict={}
            )
        except Exception as error:
            raise GraphError(error) from error
        written = set(self._folder.rglob("*.ir")) - before
        try:
            last = _last(written)
            if keep is not None:
                shutil.copyfile(last, keep)
            return read_typed_graph(last)
        finally:
            for path in written:
                path.unlink()


class _Negative(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return -x


def _executor() -> Any:
    version = mindspore.__version__
    try:
        from mindspore.common.api import _cell_graph_executor  # noqa: PLC0415 - private: may be gone

        parameters = inspect.signature(_cell_graph_executor.compile).parameters
    except (ImportError, AttributeError) as error:
        raise FrontEndUnusableError(
            f"MindSpore {version} has no front end where 2.7.2 has it: {error}"
        ) from error
    if missing := _NEEDED - set(parameters):
        raise FrontEndUnusableError(
            f"MindSpore {version} compiles graphs by other arguments than 2.7.2: no {min(missing)}"
        )
    return _cell_graph_executor


def _last(written: set[Path]) -> Path:
    for pattern in _LAST_FILES:
        if found := sorted(path for path in written if path.match(pattern)):
            return found[-1]
    raise FrontEndUnusableError(
        f"MindSpore {mindspore.__version__} wrote none of {', '.join(_LAST_FILES)}"
    )


def _telling_line(text: str) -> str:
    """The first line that is neither a rule nor a heading."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line.strip("-") and not line.startswith("- ")), text)


def _own_lines(error: Exception) -> list[str]:
    """Python's frames, then those of the code that was being parsed."""
    frames = [(one.filename, one.lineno) for one in traceback.extract_tb(error.__traceback__)]
    found = [*frames, *_TRACE.findall(str(error))]
    inside = [(Path(file), line) for file, line in found if file.startswith(f"{PACKAGE}{os.sep}")]
    here = Path(__file__).parent
    return [
        f"{file.relative_to(PACKAGE.parent)}:{line}"
        for file, line in inside
        if here not in file.parents
    ]
