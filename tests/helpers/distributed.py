"""Jobs of several processes, and how far their training is from that of one process."""

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from distributed.worker import model_config

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.grid.sharding_rules import (
    MOMENTS,
    adapter_shapes,
    parameter_shapes,
    placements,
)

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker.py"
SCALARS = ("losses", "lm", "aux", "z", "norms", "tokens", "load", "dropped", "entropy")
EVALUATED = ("eval", "held_back")


def start_job(order: str, processes: int, folder: Path, seconds: int = 240) -> None:
    """Run a program in so many processes (without a launcher if it is one); it must end well."""
    environment = {**os.environ, "PYTHON": sys.executable, "MSRUN_TIME_LIMIT": str(seconds)}
    environment |= {"GLOG_v": "3", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *shlex.split(order)]
    if processes > 1:
        launcher = str(ROOT / "scripts" / "msrun_launcher.sh")
        place = [str(free_port()), str(folder / "logs"), "False", "120"]
        command = ["bash", launcher, order, str(processes), *place]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert done.returncode == 0, f"{order}: status {done.returncode}\n{done.stdout}\n{done.stderr}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Case:
    """A layout, and the networks (of worker.MODELS) that are trained on it."""

    grid_text: str
    models: tuple[str, ...] = ("dropless", "sdrop")
    sequence_parallel: bool = False
    accumulation: int = 1
    """Micro batches of a rank, those in the pipeline included."""
    evaluate: bool = False
    """Evaluate at the end, too."""
    changes: dict = field(default_factory=dict)
    """Of the model_config."""
    choices: dict = field(default_factory=dict)
    """Of StepChoices; one process has none of them."""
    emulate: bool = False
    """With Ascend's operators and collectives, emulated; one process has the CPU's."""

    @property
    def grid(self) -> ParallelConfig:
        """Its rank grid."""
        return replace(parse_grid(self.grid_text)[0], use_seq_parallel=self.sequence_parallel)

    @property
    def zero(self) -> bool:
        """Whether the optimizer's moments are cut."""
        return parse_grid(self.grid_text)[1]

    @property
    def processes(self) -> int:
        """How many ranks there are."""
        return Mesh(self.grid).world_size

    def train(self, folder: Path, steps: int) -> Path:
        """Train; returns the folder with every rank's arrays."""
        order = [str(WORKER), str(folder), "--grid", self.grid_text, "--steps", str(steps)]
        order += ["--accumulation", str(self.accumulation), "--models", ",".join(self.models)]
        order += ["--changes", json.dumps(self.changes)]
        order += ["--choices", json.dumps(self.choices)]
        order += ["--sequence-parallel"] if self.sequence_parallel else []
        order += ["--evaluate"] if self.evaluate else []
        order += ["--emulate"] if self.emulate else []
        folder.mkdir(parents=True)
        # every process compiles its graphs, and few cores serve them all
        start_job(shlex.join(order), self.processes, folder, 120 * (1 + self.processes))
        return folder

    def alone(self) -> "Case":
        """The same micro batches on one process."""
        one = replace(self, grid_text="dp=1", sequence_parallel=False, choices={}, emulate=False)
        return replace(one, accumulation=self.accumulation * self.grid.data_parallel)


class References:
    """What one process computes, kept for the layouts that share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, dict[str, np.ndarray]] = {}

    def arrays(self, case: Case, model: str, steps: int) -> dict[str, np.ndarray]:
        """The arrays of one network of a case, all of which are trained alone."""
        one = case.alone()
        key = f"{one.accumulation}_{steps}_{one.evaluate}_{json.dumps(one.changes)}"
        if f"{model}_{key}" not in self._arrays:
            folder = one.train(self.folder / str(len(self._arrays)), steps)
            for name in one.models:
                self._arrays[f"{name}_{key}"] = dict(np.load(folder / f"{name}.rank_0.npz"))
        return self._arrays[f"{model}_{key}"]


def largest_errors(
    case: Case, folder: Path, references: References, steps: int
) -> dict[str, dict[str, tuple[float, str]]]:
    """Train a case and compare every rank's numbers with those of one process.

    Returns:
        For each network and for loss, norm and gradient: the largest error relative to the largest
        value of the tensor of one process, and where it is.
    """
    case.train(folder, steps)
    result = {}
    for model in case.models:
        reference = references.arrays(case, model, steps)
        worst = result[model] = {}
        for rank in range(case.processes):
            arrays = np.load(folder / f"{model}.rank_{rank}.npz")
            for kind, where, error in _errors(case, model, rank, arrays, reference):
                worst[kind] = max(worst.get(kind, (0.0, "")), (error, f"rank {rank} {where}"))
    return result


def _errors(case: Case, model: str, rank: int, arrays: dict, reference: dict) -> list[tuple]:
    found = [
        ("norm" if key == "norms" else "loss", key, _error(arrays[key], reference[key], ...))
        for key in SCALARS + (EVALUATED if case.evaluate else ())
    ]
    gradients = [key for key in arrays if key.startswith("grad.")]
    regions = _regions(case, model, rank, {key.split(".", 2)[2] for key in gradients})
    for key in gradients:
        region = regions[key.split(".", 2)[2]]
        found.append(("gradient", key, _error(arrays[key], reference[key], region)))
    return found


def _regions(case: Case, model: str, rank: int, names: set[str]) -> dict[str, tuple[slice, ...]]:
    """What the optimizer of a rank has of each parameter; all of a rank's parameters are there."""
    config, moment = model_config(model, **case.changes), MOMENTS[0]
    shapes = adapter_shapes(config) if config.pet_config else parameter_shapes(config)
    stage = Mesh(case.grid, rank).stage
    placed = placements(config, case.grid, [moment + n for n in shapes], zero=case.zero)
    expected = {name for name in shapes if stage in placed[moment + name]}
    assert names == expected, f"rank {rank} has gradients of other parameters: {names ^ expected}"
    return {n: placed[moment + n][stage].region(shapes[n], rank) for n in names}


def _error(got: np.ndarray, whole: np.ndarray, region: object) -> float:
    """Largest difference as a share of the whole tensor's largest value."""
    expected = whole[region]
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    assert np.isfinite(got).all(), "a value is not finite"
    difference = np.abs(got.astype(np.float64) - expected).max(initial=0.0)
    scale = np.abs(whole).max(initial=0.0)
    return float(difference / scale) if scale > 0 else float(difference)
