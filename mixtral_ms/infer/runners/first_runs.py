"""What is compiled while somebody waits for an answer is said."""

import time
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.log import get_logger


class FirstRuns:
    """Runs graphs, each of which is compiled when it runs first: that is a line in the log."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, cell: nn.Cell, inputs: Sequence[Tensor | None], what: str) -> np.ndarray:
        """The result of a graph; `what` names it."""
        begin = time.monotonic()
        result = cell(*inputs).asnumpy()
        if what not in self._seen:
            self._seen.add(what)
            seconds = time.monotonic() - begin
            get_logger().info("graph of %s: compiled and first run in %.1f s", what, seconds)
        return result
