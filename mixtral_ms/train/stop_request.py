"""SIGTERM and Ctrl-C end training after the step under way, with a checkpoint."""

import signal
from types import FrameType, TracebackType

from mixtral_ms.log import get_logger


class StopRequest:
    """Within the block, the first signal sets `signal_number`; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        get_logger().info(
            "%s: saving after this step (Ctrl-C again leaves at once)",
            signal.Signals(number).name,
        )
