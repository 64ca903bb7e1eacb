"""Signals that end training after the step under way, with a checkpoint."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mixtral_ms.log import get_logger

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,  # the terminal, or the connection to it, is gone
    signal.SIGUSR1,  # schedulers of clusters: the time is nearly up
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""What ends a run that would otherwise lose its last steps by them, the most telling first."""
_ALWAYS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the block, the first signal sets `signal_number`; a second Ctrl-C interrupts.

    While a graph runs, MindSpore turns Ctrl-C into SIGTERM: `signal_number` may be that. What nohup
    or the program around has set for the others of STOP_SIGNALS stays.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> "StopRequest":
        taken = [n for n in STOP_SIGNALS if n in _ALWAYS or signal.getsignal(n) == signal.SIG_DFL]
        self._previous = {number: signal.signal(number, self._note) for number in taken}
        return self

    def listen(self) -> None:
        """Take the signals again.

        Each graph that MindSpore runs replaces the handler of Ctrl-C by one that sends SIGTERM
        to the process itself, and leaves it in place.
        """
        for number in self._previous:
            signal.signal(number, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal_number = number
        get_logger().info(
            "%s: saving after this step (Ctrl-C while it saves leaves at once)",
            signal.Signals(number).name,
        )
