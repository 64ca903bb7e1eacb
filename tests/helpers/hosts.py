"""Several hosts of one run: each types its command in its own folder, or in one that they share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.runs import ROOT

SECONDS = 240


class HostJobs:
    """The command of each host.

    Args:
        folders: where each host types it.
        order: program and arguments, as text.
        place: WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT {} LOG_DIR JOIN CLUSTER_TIME_OUT.
        prefixes: what enters each host, such as a network namespace; none for this machine.
        launcher: the launcher's path, as it is typed.
    """

    def __init__(
        self,
        folders: list[Path],
        order: str,
        place: str,
        prefixes: list[list[str]] | None = None,
        launcher: str = str(ROOT / "scripts/msrun_launcher.sh"),
    ) -> None:
        environment = {**os.environ, "PYTHON": sys.executable, "MSRUN_TIME_LIMIT": str(SECONDS)}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.terminals = [folder / f"terminal_{host}" for host, folder in enumerate(folders)]
        self.launchers = []
        for host, folder in enumerate(folders):
            words = ["bash", launcher, order, *place.format(host).split()]
            with self.terminals[host].open("wb") as terminal:
                self.launchers.append(
                    subprocess.Popen(
                        [*(prefixes[host] if prefixes else ()), *words],
                        cwd=folder,
                        env=environment,
                        stdout=terminal,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> "HostJobs":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.launchers:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)  # its processes die with it
                one.wait(30)

    def text(self, host: int) -> str:
        """What a host's terminal showed."""
        return self.terminals[host].read_text(errors="replace")

    @property
    def everything(self) -> str:
        """What all terminals showed."""
        return "".join(map(self.text, range(len(self.terminals))))

    def finish(self) -> None:
        """Wait for the end, which must be good on all hosts."""
        statuses = [one.wait(SECONDS + 30) for one in self.launchers]
        assert not any(statuses), self.everything
