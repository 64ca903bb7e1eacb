"""Starts a process for each rank that is to be looked at, and gathers what they find."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import mixtral_ms
from mixtral_ms.config import RunConfig
from mixtral_ms.config.derived.pipeline_stages import layers_per_stage
from mixtral_ms.config.loading.resolve import effective_parallel, rank_count
from mixtral_ms.errors import UserError
from mixtral_ms.graphs.results import RankJob, RankResult, from_data, plain_data
from mixtral_ms.progress import progress_bar

_DUMP = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_DUMP_IR_PASSES": "validate", "GLOG_v": "4"}
_OF_A_JOB = ("MS_", "RANK_", "DEVICE_ID", "GLOG_")
"""How names of variables begin that tell MindSpore of another run."""
_LAST_LINES = 4


def ranks_of(text: str, config: RunConfig) -> list[int]:
    """Ranks that `--ranks` names: first, last, all (one of each kind), or numbers.

    Ranks are of one kind when their graphs differ in constants only. What makes a kind is whether
    a pipeline stage begins or ends the network, how many layers it has, and the part of the
    sequence.

    Raises:
        UserError: another word, or a rank that the run has not.
    """
    count, found = rank_count(config), set()
    for word in (one.strip() for one in text.split(",")):
        if word == "first":
            found.add(0)
        elif word == "last":
            found.add(count - 1)
        elif word == "all":
            found.update(_one_of_each_kind(config))
        elif word.isdecimal() and int(word) < count:
            found.add(int(word))
        else:
            raise UserError(
                f"--ranks {text!r}: {word!r} is none of first, last, all, and the run's ranks are "
                f"0 to {count - 1}"
            )
    return sorted(found)


def _one_of_each_kind(config: RunConfig) -> list[int]:
    grid = effective_parallel(config)
    layers = layers_per_stage(config.model.model_config, grid.pipeline_stage)
    per_stage = rank_count(config) // grid.pipeline_stage
    kinds: dict[tuple, int] = {}
    for rank in range(rank_count(config)):
        stage = rank // per_stage
        ends = (stage == 0, stage == grid.pipeline_stage - 1)
        part = rank // grid.model_parallel % grid.context_parallel
        kinds.setdefault((*ends, layers[stage], part), rank)
    return [*kinds.values(), rank_count(config) - 1]


def check_ranks(jobs: Sequence[RankJob], processes: int = 1) -> list[RankResult]:
    """Compile the graphs of some ranks, so many at a time; in the order of the jobs."""
    with (
        ThreadPoolExecutor(processes) as pool,
        progress_bar(len(jobs), "compiling graphs", "rank") as bar,
    ):
        futures = [pool.submit(_check_rank, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        return [future.result() for future in futures]


def _check_rank(job: RankJob) -> RankResult:
    with tempfile.TemporaryDirectory(prefix="mixtral_ms_graphs_") as name:
        folder = Path(name)
        (folder / "graphs").mkdir()
        job_file, out = folder / "job.json", folder / "result.json"
        job_file.write_text(json.dumps(plain_data(job)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mixtral_ms.graphs.rank_worker", str(job_file), str(out)],
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            return RankResult(job.rank, error=_how_it_ended(done))
        return from_data(RankResult, json.loads(out.read_text(encoding="utf-8")))


def _environment(folder: Path) -> dict[str, str]:
    kept = {key: one for key, one in os.environ.items() if not key.startswith(_OF_A_JOB)}
    packages = [str(Path(mixtral_ms.__file__).parents[1]), kept.get("PYTHONPATH", "")]
    places = {"MS_DEV_SAVE_GRAPHS_PATH": str(folder / "graphs"), "MS_OM_PATH": str(folder)}
    return {**kept, **_DUMP, **places, "PYTHONPATH": os.pathsep.join(filter(None, packages))}


def _how_it_ended(done: subprocess.CompletedProcess) -> str:
    words = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
    if done.returncode < 0:
        hint = ": too little memory? fewer --layers need less" if done.returncode == -9 else ""
        return f"the process was ended by signal {-done.returncode}{hint}\n{words}".strip()
    return f"the process ended with status {done.returncode}\n{words}".strip()


def mindspore_version() -> str:
    """Of the installed package, which is not imported here."""
    return version("mindspore")
