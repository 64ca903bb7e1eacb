"""Training runs of several processes, started as a user starts them."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from helpers.distributed import free_port
from helpers.runs import ROOT
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh

SECONDS = 200


class Job:
    """A run under scripts/msrun_launcher.sh, in a session of its own.

    Args:
        folder: where it runs; logs go to `folder/logs`.
        order: program and arguments.
        processes: how many.
        seconds: after which it is ended.
    """

    def __init__(
        self, folder: Path, order: list[object], processes: int, seconds: int = SECONDS
    ) -> None:
        self.folder = folder
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.output = folder / "logs" / "terminal"
        environment = {**os.environ, "PYTHON": sys.executable, "MSRUN_TIME_LIMIT": str(seconds)}
        environment |= {"OMP_NUM_THREADS": "1"}
        launcher = str(ROOT / "scripts" / "msrun_launcher.sh")
        place = [str(free_port()), str(folder / "logs"), "False", "90"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", launcher, shlex.join(map(str, order)), str(processes), *place],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its processes die with it
            self.process.wait(30)

    @property
    def text(self) -> str:
        """What the terminal showed."""
        return self.output.read_text(errors="replace")

    def finish(self, seconds: float = SECONDS) -> int:
        """Wait for its end; returns the status."""
        return self.process.wait(seconds)

    def wait_for_steps(self, count: int) -> None:
        """Return when it has done so many steps, or has ended."""
        end = time.monotonic() + SECONDS
        while self.text.count("  loss ") < count and self.process.poll() is None:
            assert time.monotonic() < end, self.text
            time.sleep(0.01)

    def pid_of(self, rank: int) -> int:
        """Process number of a rank."""
        wanted = {b"MS_ROLE=MS_WORKER", b"RANK_ID=%d" % rank}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                here = (entry / "cwd").readlink() == self.folder.resolve()
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if here and wanted <= set(variables):
                return int(entry.name)
        raise AssertionError(f"rank {rank} is not running:\n{self.text}")

    def alive(self) -> bool:
        """Whether any of its processes is there."""
        return any(_is_in(entry, self.folder) for entry in Path("/proc").glob("[0-9]*"))


def _is_in(process: Path, folder: Path) -> bool:
    try:
        running = process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return running and (process / "cwd").readlink() == folder.resolve()
    except OSError:
        return False


def run_order(yaml: Path, output: Path, *more: object) -> list[object]:
    """MindFormers' launcher with a YAML."""
    return [ROOT / "run_mindformer.py", "--config", yaml, "--output_dir", output, *more]


def layout_flags(text: str, micro_batches: int = 2) -> list[str]:
    """Flags of a layout (`dp=2,mp=2`) on which a step takes so many micro batches in all."""
    grid, zero = parse_grid(text)
    micro_batches //= grid.data_parallel
    sizes = {
        "data_parallel": grid.data_parallel,
        "model_parallel": grid.model_parallel,
        "expert_parallel": grid.expert_parallel,
        "pipeline_stage": grid.pipeline_stage,
        "context_parallel": grid.context_parallel,
    }
    flags = [f"--parallel_config.{key}={size}" for key, size in sizes.items()]
    if grid.pipeline_stage > 1:
        flags.append(f"--parallel_config.micro_batch_num={micro_batches}")
        micro_batches = 1
    flags.append(f"--gradient_accumulation_steps={micro_batches}")
    flags.append(f"--parallel.enable_parallel_optimizer={zero}")
    return [f"--use_parallel={Mesh(grid).world_size > 1}", *flags]


def run_layout(
    folder: Path, yaml: Path, output: Path, layout: str, *more: object, micro_batches: int = 2
) -> str:
    """Run a layout to its end, which must be good; returns what the terminal showed."""
    grid, _ = parse_grid(layout)
    order = run_order(yaml, output, *layout_flags(layout, micro_batches), *more)
    with Job(folder, order, Mesh(grid).world_size) as job:
        assert job.finish() == 0, job.text
        return job.text


def assert_close_records(got: list[dict], expected: list[dict], tolerance: float = 1e-5) -> float:
    """Every number of every record agrees, relative to 1 or more; returns the largest error."""
    keys = [(one["kind"], one["step"]) for one in expected]
    assert [(one["kind"], one["step"]) for one in got] == keys
    worst = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in theirs.keys() - {"kind"}:
            a, b = (np.asarray(one[key], np.float64) for one in (mine, theirs))
            error = float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max(initial=0.0))
            assert error <= tolerance, (
                f"step {theirs['step']}: {key} {mine[key]}, not {theirs[key]}"
            )
            worst = max(worst, error)
    return worst
