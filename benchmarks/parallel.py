"""Several processes: step time, memory and bytes sent of a rank, beside what is planned.

Every layout trains the same network on as many rows a step. Each is a job under
scripts/msrun_launcher.sh, one after another, all on this machine's cores: step times show what
splitting costs here, not what it gains on devices of their own. Memory is the peak of a rank above
what importing MindSpore and meeting the others takes. Bytes are counted where collectives are
called, by a process that stands for one rank and has nobody to talk to.

example:
  python benchmarks/parallel.py --steps 5
  python benchmarks/parallel.py --layouts dp=1 dp=2,zero=1 --hidden_size 512 --steps 3
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from memory import status_bytes

from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.loading.resolve import micro_batches
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.parallel.planner.memory_model import memory_plan
from mixtral_ms.parallel.planner.traffic_model import traffic_plan

ROOT = Path(__file__).parents[1]
YAML = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
SIZES = {
    "model.model_config.seq_length": 128,
    "model.model_config.vocab_size": 8192,
    "model.model_config.hidden_size": 256,  # --hidden_size, and experts twice as wide
    "model.model_config.intermediate_size": 512,
    "model.model_config.num_layers": 4,
    "model.model_config.num_heads": 8,
    "model.model_config.n_kv_heads": 4,
    "moe_config.expert_num": 8,
    "runner_config.batch_size": 2,
}
LAYOUTS = (
    "dp=1",
    "dp=2",
    "dp=2,zero=1",
    "dp=2,ep=2",
    "mp=2",
    "mp=2,ep=2",
    "cp=2",
    "pp=2",
    "dp=2,mp=2,ep=2,zero=1",
)
MICRO_BATCHES = 4
"""Of a step, over all data-parallel ranks."""
KINDS = {
    "tensor": "tensor_parallel",
    "exchange": "expert_parallel",
    "context": "context_parallel",
    "pair": "pipeline",
}
"""Kinds of groups by the names that the plan has for them; all others carry gradients."""
SECONDS = 600


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="as in dp=2,mp=2,zero=1")
    parser.add_argument("--hidden_size", type=int, default=256, help="256; experts twice as wide")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--describe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    SIZES["model.model_config.hidden_size"] = args.hidden_size
    SIZES["model.model_config.intermediate_size"] = 2 * args.hidden_size
    if args.worker:
        train(args.worker[0], Path(args.worker[1]), args.steps)
    elif args.describe:
        print(json.dumps(counted_bytes(args.describe)))
    else:
        compare(args.layouts, args.steps)


def compare(layouts: list[str], steps: int) -> None:
    """Print the tables."""
    measured = {layout: run_job(layout, steps) for layout in layouts}
    print(
        "| layout | processes | ms/step | peak MB of a rank | planned MB |\n|---|---|---|---|---|"
    )
    for layout, ranks in measured.items():
        milliseconds = statistics.median(max(one) for one in zip(*(r["ms"] for r in ranks)))  # noqa: B905
        peak = max(r["peak"] for r in ranks) / 1e6
        planned = max(one.total for one in memory_plan(config_of(layout))) / 1e6
        print(f"| {layout} | {len(ranks)} | {milliseconds:.0f} | {peak:.0f} | {planned:.0f} |")
    print("\n| layout | for | counted bytes a step | planned | ratio |\n|---|---|---|---|---|")
    for layout in layouts:
        if mesh_of(layout).world_size > 1:
            print_bytes(layout)


def print_bytes(layout: str) -> None:
    """The rows of one layout."""
    hidden = str(SIZES["model.model_config.hidden_size"])
    order = [sys.executable, __file__, "--describe", layout, "--hidden_size", hidden]
    done = subprocess.run(order, check=True, capture_output=True, text=True, timeout=SECONDS)
    counted = json.loads(done.stdout.splitlines()[-1])
    plan = traffic_plan(config_of(layout))[0]
    for name in (*KINDS.values(), "data_parallel"):
        planned = getattr(plan, name)
        if planned or counted.get(name):
            ratio = f"{counted.get(name, 0) / planned:.3f}" if planned else ""
            what = f"{counted.get(name, 0):,.0f} | {planned:,.0f} | {ratio}"
            print(f"| {layout} | {name.replace('_', ' ')} | {what} |")


def mesh_of(layout: str) -> Mesh:
    """The first rank of a layout."""
    return Mesh(parse_grid(layout)[0])


def config_of(layout: str) -> RunConfig:
    """The run on a layout."""
    grid, zero = parse_grid(layout)
    left = MICRO_BATCHES // grid.data_parallel
    staged = grid.pipeline_stage > 1
    grid = replace(grid, micro_batch_num=left if staged else 1)
    config = load_config(YAML, [f"{key}={value}" for key, value in SIZES.items()])
    config.runner_config.gradient_accumulation_steps = 1 if staged else left
    config.parallel_config, config.use_parallel = grid, mesh_of(layout).world_size > 1
    config.parallel.enable_parallel_optimizer = zero
    return config


def run_job(layout: str, steps: int) -> list[dict]:
    """Train on a layout; what each rank measured."""
    processes = mesh_of(layout).world_size
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        hidden = SIZES["model.model_config.hidden_size"]
        order = f"{Path(__file__)} --worker {layout} {folder} --steps {steps}"
        order += f" --hidden_size {hidden}"
        launcher = str(ROOT / "scripts/msrun_launcher.sh")
        place = [str(processes), port, f"{folder}/logs", "False", "120"]
        environment = {**os.environ, "PYTHON": sys.executable, "MSRUN_TIME_LIMIT": str(SECONDS)}
        subprocess.run(
            ["bash", launcher, order, *place],
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=SECONDS + 60,
        )
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(processes)]


def train(layout: str, folder: Path, steps: int) -> None:
    """One rank: train on made-up rows and write what was measured."""
    from mixtral_ms.parallel.comm.device import set_up_device  # noqa: PLC0415 - takes seconds
    from mixtral_ms.parallel.comm.process_groups import connect  # noqa: PLC0415 - takes seconds

    config = config_of(layout)
    set_up_device(config)
    mesh = connect(config.parallel_config)
    before, times = status_bytes("VmRSS"), []
    step = build_step(config, mesh)
    for number in range(steps + 1):
        begin = time.perf_counter()
        step(own_rows(config, mesh, number), 1e-4)
        times.append(1000 * (time.perf_counter() - begin))
    result = {"ms": times[1:], "peak": status_bytes("VmHWM") - before}
    (folder / f"{mesh.rank}.json").write_text(json.dumps(result))


def counted_bytes(layout: str) -> dict[str, float]:
    """What the first rank of a layout sends in one step, by the plan's names."""
    import mindspore  # noqa: PLC0415 - takes seconds

    from mixtral_ms.parallel.comm.transports import sent_bytes  # noqa: PLC0415 - takes seconds

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    mindspore.set_device("CPU")
    config = config_of(layout)
    mesh = Mesh(config.parallel_config)
    step = build_step(config, mesh)
    sent_bytes.clear()
    step(own_rows(config, mesh, 0), 1e-4)
    result: dict[str, float] = {}
    for kind, size in sent_bytes.items():
        if kind == "world":  # a few numbers for the log
            continue
        name = KINDS.get(kind, "data_parallel")
        result[name] = result.get(name, 0) + size
    return result


def build_step(config: RunConfig, mesh: Mesh) -> object:
    """The training step of a rank."""
    from mixtral_ms.train.builders import build_network, build_optimizer  # noqa: PLC0415 - as above
    from mixtral_ms.train.step.train_step import TrainStep  # noqa: PLC0415 - as above

    network = build_network(config, mesh)
    return TrainStep(network, build_optimizer(config, network), micro_batches(config), 1.0)


def own_rows(config: RunConfig, mesh: Mesh, step: int) -> list:
    """This rank's part of made-up rows."""
    model = config.model.model_config
    width = model.seq_length // mesh.grid.context_parallel
    columns = slice(mesh.context_index * width, (mesh.context_index + 1) * width)
    batches = []
    for number in range(micro_batches(config)):
        chance = np.random.default_rng((step, number, mesh.data_index))
        shape = (config.runner_config.batch_size, model.seq_length + 1)
        ids = chance.integers(3, model.vocab_size, shape).astype(np.int32)
        batches.append(Batch(ids[:, :-1][:, columns], ids[:, 1:][:, columns]))
    return batches


if __name__ == "__main__":
    main()
