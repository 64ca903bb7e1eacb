"""What `scripts/msrun_launcher.sh` runs: the processes of a distributed run on one machine.

Each process gets the environment that MindSpore's msrun gives it. msrun itself is not run: it
notices a dead worker after half a minute and leaves workers behind when it is ended.
"""

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.cli.support.worker_processes import Worker, watch
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.comm.launched import HCCL_WAITS

T = TypeVar("T")

_LOWEST_PORT, _HIGHEST_PORT = 1024, 65535
_DEFAULT_GRACE = 30.0
_DEFAULTS = {
    "PYTHONUNBUFFERED": "1",  # a log shows a line when it is written
    "GLOG_v": "3",  # MindSpore's errors only: its warnings are hundreds of lines a start
}


@dataclass(frozen=True)
class MsrunJob:
    """Which processes there are, on all machines and on this one."""

    worker_num: int
    local_worker: int
    address: str
    """IPv4 address of the machine with node rank 0."""
    port: int
    node_rank: int
    time_out: int
    """Seconds until all processes have met."""

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        first = self.node_rank * self.local_worker
        return range(first, first + self.local_worker)

    def scheduler_environment(self) -> dict[str, str]:
        """What msrun sets for the process through which the others meet."""
        return {
            "MS_ROLE": "MS_SCHED",
            "MS_WORKER_NUM": str(self.worker_num),
            "MS_SCHED_HOST": self.address,
            "MS_SCHED_PORT": str(self.port),
            "MS_TOPO_TIMEOUT": str(self.time_out),
            "RANK_SIZE": str(self.worker_num),
            "RANK_ID": "0",
        }

    def worker_environment(self, rank: int) -> dict[str, str]:
        """What msrun sets for the process of a rank."""
        return self.scheduler_environment() | {
            "MS_ROLE": "MS_WORKER",
            "MS_NODE_ID": str(rank),
            "MS_NODE_RANK": str(self.node_rank),
            "RANK_ID": str(rank),
            "DEVICE_ID": str(rank - self.ranks[0]),
        }


def main(argv: Sequence[str]) -> int:
    """Run a distributed program; returns the exit status of the worker that failed, or 0.

    Args:
        argv: WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN
            CLUSTER_TIME_OUT, then the program and its arguments.

    Raises:
        UserError: an argument that is wrong, a program that is not there, a port in use.
    """
    worker_num, local_worker, address, port, node_rank, log_dir, join, time_out, *order = argv
    job = _job(worker_num, local_worker, address, port, node_rank, time_out)
    if join.lower() not in ("true", "false"):
        raise UserError(f"JOIN {join!r} must be True or False")
    time_limit = _seconds("MSRUN_TIME_LIMIT", None)
    grace = _seconds("MSRUN_GRACE", _DEFAULT_GRACE)
    command = _command(order)
    if job.node_rank == 0:
        _check_port(job)
    scheduler, workers = _processes(job, command, _log_folder(log_dir))
    shown = workers if join.lower() == "true" else workers[:1]
    print(_started(job, workers, shown), flush=True)
    return watch(workers, scheduler, shown, grace=grace, time_limit=time_limit)


def _job(
    worker_num: str, local_worker: str, address: str, port: str, node_rank: str, time_out: str
) -> MsrunJob:
    workers = _number("WORKER_NUM", worker_num, 1)
    local = _number("LOCAL_WORKER", local_worker, 1)
    number = _number("MASTER_PORT", port, _LOWEST_PORT, _HIGHEST_PORT)
    node, seconds = _number("NODE_RANK", node_rank, 0), _number("CLUSTER_TIME_OUT", time_out, 1)
    if workers % local:
        raise UserError(
            f"WORKER_NUM {workers} is not a multiple of LOCAL_WORKER {local}: every machine has "
            "the same number of processes"
        )
    if workers == local:  # one machine: the address and the rank of a node say nothing
        return MsrunJob(workers, local, "127.0.0.1", number, 0, seconds)
    if node >= workers // local:
        raise UserError(
            f"NODE_RANK {node}: WORKER_NUM {workers} with LOCAL_WORKER {local} are "
            f"{workers // local} machines, 0 … {workers // local - 1}"
        )
    return MsrunJob(workers, local, _resolved(address), number, node, seconds)


def _number(name: str, text: str, lowest: int, highest: int | None = None) -> int:
    if text.isascii() and text.isdecimal() and lowest <= int(text) <= (highest or int(text)):
        return int(text)
    most = f" and at most {highest}" if highest else ""
    raise UserError(f"{name} {text!r} must be a whole number of at least {lowest}{most}")


def _seconds(name: str, default: T) -> float | T:
    """A duration of the environment."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name} {text!r} must be a number of seconds above 0")
    return value


def _resolved(address: str) -> str:
    try:
        return socket.gethostbyname(address)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {address!r} is neither an IPv4 address nor a host name that is known "
            f"here: {error.strerror or error}"
        ) from None


def _check_port(job: MsrunJob) -> None:
    """Can the scheduler listen?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((job.address, job.port))
            probe.listen()
        except OSError as error:
            raise UserError(_why_not(job, error)) from None


def _why_not(job: MsrunJob, error: OSError) -> str:
    if "assign" in (error.strerror or ""):
        return (
            f"MASTER_ADDR {job.address} is not an address of this machine, which has "
            "NODE_RANK 0: give its address, and the other machines NODE_RANK 1, 2, …"
        )
    with socket.socket() as other:
        other.bind((job.address, 0))
        free = other.getsockname()[1]
    return (
        f"MASTER_PORT {job.port}: {error.strerror or error} on {job.address}: another run "
        f"may be under way; give another port, such as {free}, on every machine"
    )


def _command(order: Sequence[str]) -> list[str]:
    """The order as msrun reads it: without an interpreter it is a Python script."""
    program, *arguments = order
    if program in ("python", "python3"):
        program, *arguments = arguments or [""]
        if program.startswith("-"):
            return [sys.executable, program, *arguments]
    elif program == "pytest":
        return [sys.executable, "-m", "pytest", *arguments]
    if not Path(program).is_file():
        raise UserError(
            f"EXECUTE_ORDER: {program!r} is not a file in {Path.cwd()}: it must begin with a "
            "Python script"
        )
    return [sys.executable, program, *arguments]


def _log_folder(log_dir: str) -> Path:
    folder = Path(log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"LOG_DIR {log_dir!r} cannot be made: {error.strerror}") from None
    return folder


def _processes(
    job: MsrunJob, command: Sequence[str], folder: Path
) -> tuple[Worker | None, list[Worker]]:
    """The scheduler, which only the first machine has, and the workers; not yet started."""
    base = _DEFAULTS | HCCL_WAITS | dict(os.environ)
    shares = _shares_of_cores(job.local_worker) if _binds_cores() else [None] * job.local_worker
    workers = [
        Worker(
            f"rank {rank}",
            command,
            base | job.worker_environment(rank),
            folder / f"worker_{rank}.log",
            cores,
        )
        for rank, cores in zip(job.ranks, shares, strict=True)
    ]
    if job.node_rank:
        return None, workers
    environment = base | job.scheduler_environment()
    return Worker("the scheduler", command, environment, folder / "scheduler.log"), workers


def _binds_cores() -> bool:
    text = os.environ.get("MSRUN_BIND_CORE") or "False"
    if text.lower() not in ("true", "false"):
        raise UserError(f"MSRUN_BIND_CORE {text!r} must be True or False")
    return text.lower() == "true"


def _shares_of_cores(workers: int) -> list[list[int]]:
    """Of the cores that this process may use, as many equal runs of neighbours as workers.

    Devices and memory nodes are numbered in the same order as cores on the usual machines.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // workers
    if not share:
        raise UserError(
            f"MSRUN_BIND_CORE True: {workers} processes cannot have a core each, as there are "
            f"{len(cores)}: leave it out"
        )
    return [cores[i * share : (i + 1) * share] for i in range(workers)]


def _started(job: MsrunJob, workers: Sequence[Worker], shown: Sequence[Worker]) -> str:
    others = job.worker_num - job.local_worker
    elsewhere = f", {others} on other machines (NODE_RANK here {job.node_rank})"
    logs = [str(worker.log) for worker in workers]
    output = shutil.get_terminal_size().columns * "-"
    return (
        f"{job.local_worker} process{'es' * (job.local_worker > 1)} here"
        f"{elsewhere if others else ''}; they meet at {job.address}:{job.port}\n"
        f"logs: {logs[0]}{f' … {logs[-1]}' if len(logs) > 1 else ''}\n"
        f"output of {', '.join(worker.name for worker in shown)}:\n{output}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
