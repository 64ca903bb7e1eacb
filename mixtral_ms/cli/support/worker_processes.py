"""Processes that belong together: started, followed and ended as one."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from mixtral_ms.cli.support.exit_status import EXIT_BAD_INPUT, EXIT_FAILURE
from mixtral_ms.train.stop_signals import STOP_SIGNALS

EXIT_TIME_LIMIT = 124
"""As `timeout` gives it."""

_POLL_SECONDS = 0.1
_AFTER_FAILURE_SECONDS = 3.0  # the others wait for the dead one and can save nothing
_SAME_ERROR_SECONDS = 5.0  # between ranks that all find the same mistake in what they were given
_SCHEDULER_SECONDS = 10.0  # it ends by itself when all workers have left
_TAIL_BYTES, _TAIL_LINES, _ERROR_LINES = 1 << 16, 20, 40
_ERROR_STARTS = ("Traceback (most recent call last)", "error: ", "failed: ")
_TEARDOWN = re.compile(rb"^\[INFO\] DISTRIBUTED\([^\n]*(\n|\Z)", re.MULTILINE)
"""What MindSpore logs while it is unloaded, when it no longer knows GLOG_v."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Worker:
    """One process in a session of its own, with all it prints in a log.

    Args:
        name: what messages call it.
        command: the program and its arguments.
        environment: all of it.
        log: where its output goes; overwritten.
        cores: it may run on these alone; None lets it run on all.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cores: Sequence[int] | None = None,
    ) -> None:
        self.name, self.log, self._cores = name, log, cores
        self._command, self._environment = command, environment
        self._process: subprocess.Popen | None = None
        self._shown = 0
        self._unfinished_line = b""
        self.status: int | None = None
        """Its exit status, 128 + n when signal n ended it; None while it runs."""

    def start(self) -> None:
        """Start it; it dies with this process, however that ends."""
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            if self._cores:
                os.sched_setaffinity(0, self._cores)

        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the user's own program
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads here
            )

    def poll(self) -> int | None:
        """Notice whether it has ended; then end what it has left running. Returns the status."""
        if self.status is None and self._process is not None:
            code = self._process.poll()
            if code is not None:
                self.status = code if code >= 0 else 128 - code
                _signal_group(self._process, signal.SIGKILL)
        return self.status

    def signal(self, number: int) -> None:
        """Send a signal to it and to what it has started, if it still runs."""
        if self._process is not None and self.poll() is None:
            _signal_group(self._process, number)

    def kill(self) -> None:
        """End it now and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self.poll()

    def show(self, *, named: bool) -> None:
        """Print what it has written since the last time; `named` puts its name before lines."""
        new = self._read_from(self._shown)
        self._shown += len(new)
        new = _TEARDOWN.sub(b"", new)
        if named:
            *lines, self._unfinished_line = (self._unfinished_line + new).split(b"\n")
            new = b"".join(b"[%s] %s\n" % (self.name.encode(), line) for line in lines)
        if new:
            sys.stdout.buffer.write(new)
            sys.stdout.buffer.flush()

    def last_words(self) -> str:
        """The end of its log, from the last error on where there is one."""
        text = self._read_from(max(0, self.log.stat().st_size - _TAIL_BYTES))
        lines = _TEARDOWN.sub(b"", text).decode(errors="replace").rstrip().splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(_ERROR_STARTS)]
        if starts:
            return "\n".join(lines[starts[-1] :][:_ERROR_LINES])
        return "\n".join(lines[-_TAIL_LINES:])

    def how_it_ended(self) -> str:
        """Its exit status in words."""
        if self.status is not None and self.status > 128:  # noqa: PLR2004 - the shell's convention
            with contextlib.suppress(ValueError):
                name = signal.Signals(self.status - 128).name
                return f"{self.name} was ended by {name} (status {self.status})"
        return f"{self.name} ended with status {self.status}"

    def _read_from(self, offset: int) -> bytes:
        with self.log.open("rb") as log:
            log.seek(offset)
            return log.read()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def watch(
    workers: Sequence[Worker],
    scheduler: Worker | None,
    shown: Sequence[Worker],
    *,
    grace: float,
    time_limit: float | None = None,
) -> int:
    """Start all, show the output of some, and end all when one fails or a signal comes.

    Args:
        workers: of which all must succeed.
        scheduler: ends by itself after the workers; its failure counts when no worker has failed.
        shown: whose output goes to the terminal.
        grace: seconds between SIGTERM and SIGKILL when a signal or the time limit ends the run.
        time_limit: seconds that all may take; None for no limit.

    Returns:
        0, the status of the worker that failed first, 128 + n for signal n, EXIT_TIME_LIMIT.
    """
    return _Watch(workers, scheduler, shown, grace, time_limit).run()


class _Watch:
    def __init__(
        self,
        workers: Sequence[Worker],
        scheduler: Worker | None,
        shown: Sequence[Worker],
        grace: float,
        time_limit: float | None,
    ) -> None:
        self.workers, self.scheduler, self.shown = workers, scheduler, shown
        self.grace = grace
        self.end = time.monotonic() + time_limit if time_limit else float("inf")
        self.time_limit = time_limit
        self.signals: list[int] = []

    def run(self) -> int:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and & stay what they are
                signal.signal(number, self._note)
        try:
            if self.scheduler is not None:
                self.scheduler.start()
            for worker in self.workers:
                worker.start()
            status = self._until_one_ends_it()
            self._show()
            return status
        finally:
            for worker in self._all():
                worker.kill()

    def _until_one_ends_it(self) -> int:
        while True:
            self._pass()
            if failed := [worker for worker in self.workers if worker.poll()]:
                return self._failure(failed)
            if all(worker.poll() == 0 for worker in self.workers):
                return self._success()
            if self.scheduler is not None and self.scheduler.poll():
                # workers that lose it, or that made it fail, say more about why
                self._wait(_AFTER_FAILURE_SECONDS, lambda: any(w.poll() for w in self.workers))
                failed = [worker for worker in self.workers if worker.poll()]
                return self._failure(failed or [self.scheduler])
            if self.signals:
                number = self.signals[0]
                return self._stopped(f"{signal.Signals(number).name}", 128 + number)
            if time.monotonic() > self.end:
                return self._stopped(f"MSRUN_TIME_LIMIT {self.time_limit:g} s", EXIT_TIME_LIMIT)

    def _failure(self, failed: Sequence[Worker]) -> int:
        """Say whose fault it was, then end the others."""
        main = self.shown[0]
        if failed[0].status == EXIT_BAD_INPUT and main not in failed:
            # what all ranks find wrong is said once, by the one whose output is shown
            self._wait(_SAME_ERROR_SECONDS, lambda: main.poll() is not None)
            failed = [main] if main.poll() == EXIT_BAD_INPUT else failed
        self._show()
        first = failed[0]
        lines = ["", f"failed: {first.how_it_ended()}; its log is {first.log}"]
        if first not in self.shown and (words := first.last_words()):
            lines += [f"  | {line}" for line in words.splitlines()]
        lines += [f"{worker.how_it_ended()}; its log is {worker.log}" for worker in failed[1:]]
        running = [worker for worker in self.workers if worker.poll() is None]
        if running:
            lines.append(f"ending the other {len(running)} here")
        print("\n".join(lines), file=sys.stderr, flush=True)
        self._end_workers(_AFTER_FAILURE_SECONDS)
        return first.status or EXIT_FAILURE

    def _stopped(self, why: str, status: int) -> int:
        seconds = f"{self.grace:g} s to end (again: at once)"
        print(f"\n{why}: the processes have {seconds}", file=sys.stderr, flush=True)
        self._end_workers(self.grace)
        return status

    def _success(self) -> int:
        if (scheduler := self.scheduler) is not None:
            self._wait(_SCHEDULER_SECONDS, lambda: scheduler.poll() is not None)
        return 0

    def _end_workers(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL to those that are there after some seconds or another signal."""
        seen = len(self.signals)
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        self._wait(
            seconds,
            lambda: len(self.signals) > seen or all(w.poll() is not None for w in self.workers),
        )
        for worker in self.workers:
            worker.kill()

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            self._pass()

    def _pass(self) -> None:
        time.sleep(_POLL_SECONDS)
        self._show()

    def _show(self) -> None:
        for worker in self.shown:
            worker.show(named=len(self.shown) > 1)

    def _all(self) -> list[Worker]:
        return [*self.workers, *([self.scheduler] if self.scheduler else [])]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
