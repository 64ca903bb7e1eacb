"""A process that reads damaged files, so that no input can end or stop the tests themselves."""

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from helpers.runs import ROOT, environment

_LIMIT_S = 10
"""Of the processor's time, so that a busy machine does not decide."""
_WAIT_S = 120


class FuzzWorker:
    """Reads files by kind; a death or a hang is an outcome, and the next file has a new process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def read(self, kind: str, path: Path) -> dict[str, str]:
        """{"data": digest}, {"refused": message} or {"failed": what}."""
        process = self._process or self._start()
        process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        process.stdin.flush()
        line = self._line()
        return json.loads(line) if line else {"failed": self._how_it_ended()}

    def _start(self) -> subprocess.Popen:
        tests = str(ROOT / "tests")
        path = os.pathsep.join([str(ROOT), tests])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from helpers.fuzz_worker import serve; serve()"],
            env={**environment(), "PYTHONPATH": path, "GLOG_v": "4"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._line() == "ready\n", "the worker did not start"
        return self._process

    def _line(self) -> str:
        readable, _, _ = select.select([self._process.stdout], [], [], _WAIT_S)
        return self._process.stdout.readline() if readable else ""

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status in (None, -signal.SIGPROF):
            return f"took more than {_LIMIT_S} s"
        return f"the interpreter ended with {status}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """The worker's side: a line in, a line out."""
    from helpers.fuzz_kinds import KINDS, digest  # noqa: PLC0415 - in the worker alone
    from mixtral_ms.errors import UserError  # noqa: PLC0415

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        kind, path = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, _LIMIT_S)  # ends the process
        try:
            outcome = {"data": digest(KINDS[kind].read(Path(path)))}
        except UserError as error:
            outcome = {"refused": str(error)}
        except OSError as error:  # a command says so of the path
            key = "refused" if isinstance(error.filename, str) else "failed"
            outcome = {key: str(error)}
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = {
                "failed": f"{type(error).__name__}: {str(error)[:300]} ({where.name} in "
                f"{Path(where.filename).name}:{where.lineno})"
            }
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()
