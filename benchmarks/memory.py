"""Memory of a process as Linux counts it, in bytes."""

import re
import threading
import time
from pathlib import Path

_SAMPLE_S = 0.02


def status_bytes(key: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status: VmHWM is the peak of this program alone.

    resource.getrusage's ru_maxrss is not: a child begins with its parent's peak.
    """
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024


class AnonymousPeak(threading.Thread):
    """Samples a process's anonymous memory (what it allocated, not files it has mapped)."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak = pid, 0
        self.start()

    def run(self) -> None:
        """Until the process ends."""
        while True:
            try:
                self.peak = max(self.peak, status_bytes("RssAnon", self.pid))
            except (OSError, TypeError):  # it has ended, or is a zombie without memory
                return
            time.sleep(_SAMPLE_S)
