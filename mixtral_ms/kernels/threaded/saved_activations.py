"""What a forward operator in numpy keeps for its backward, beside MindSpore.

MindSpore copies what goes out of such an operator, copies it again for the one that reads it, and
holds that copy until its next run. A ticket of one number goes there instead, so that backward
still depends on its forward.
"""

import itertools

import numpy as np

# For a forward that keeps nothing.
NO_TICKET = np.zeros(1, np.int32)


class Kept:
    """Two arrays of the last forward, until its backward takes them."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def drop(self) -> None:
        """Forget what an earlier forward kept, so that its memory serves the next one."""
        self._arrays = {}

    def keep(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Keep these instead; returns their ticket (1)."""
        number = next(self._numbers)
        self._arrays = {number: (first, second)}
        return np.array([number], np.int32)

    def take(self, ticket: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """What was kept under a ticket, once; None where another forward has come since."""
        return self._arrays.pop(int(ticket[0]), None)
