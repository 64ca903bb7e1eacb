#!/usr/bin/env python3
"""What a machine with Ascend devices shows of mixtral-ms, as a table to send back.

- kernels: the contract tests of the kernels, on the device (needs pytest and hypothesis).
- training: a tiny network on 1, 2 and 8 devices, its losses beside those of one CPU process, which
  lie in ascend_check_losses.json.
- layer: one layer of Mixtral 8x7B at its true widths, with memory and time of a step.

With --device CPU it tries itself on a machine without a device: the layer is then a small one.

example:
  bash scripts/ascend_check.sh --output check
  bash scripts/ascend_check.sh --device CPU --devices 1,2 --parts training,layer
"""

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ROOT / "scripts" / "ascend_check_losses.json"
TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
LARGE = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
PARTS = ("kernels", "training", "layer")
STEPS, LAYER_STEPS, GLOBAL_BATCH = 10, 6, 8
TINY_DATA, TINY_LENGTH = "tiny.mindrecord", 64

# Devices -> the grid; a step has the same sequences on each, and so the same loss.
GRIDS = {1: {}, 2: {"model_parallel": 2}, 8: {"model_parallel": 2, "pipeline_stage": 2}}
GRIDS[8] |= {"data_parallel": 2, "expert_parallel": 2}

# Largest difference of a loss, as a part of it. A device computes attention in 16 bits and sums in
# another order; the CPU only the latter.
BOUNDS = {"CPU": 1e-4, "Ascend": 1e-2}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    part: str
    verdict: str  # passed, FAILED or measured
    detail: str


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    device: str
    devices: tuple[int, ...]
    parts: tuple[str, ...]
    output: Path
    seconds: int


def write_data(path: Path, rows: int, length: int, vocab: int) -> None:
    """A MindRecord of walks over the vocabulary: the next id is near the last one."""
    import numpy as np  # noqa: PLC0415 - not for --help

    from mixtral_ms.data.mindrecord.writer import RecordWriter  # noqa: PLC0415

    steps = np.random.RandomState(0).randint(1, 8, (rows, length + 1))
    with RecordWriter(path, overwrite=True) as writer:
        writer.write(input_ids=(np.cumsum(steps, 1) % vocab).astype(np.int32))


def write_tiny_data(options: Options) -> None:
    """What the tiny network is trained on."""
    write_data(options.output / TINY_DATA, STEPS * GLOBAL_BATCH, TINY_LENGTH, 32000)


def run(options: Options, name: str, order: Sequence[object], processes: int = 1) -> str | None:
    """Start a program, on several devices by the launcher; why it failed, or None.

    What it prints goes to OUTPUT/NAME.log.
    """
    log = _log(options, name)
    command = [sys.executable, *map(str, order)]
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = ROOT / "scripts" / "msrun_launcher.sh"
        place = (processes, port, options.output / f"{name}-ranks", "False", options.seconds)
        command = ["bash", *map(str, (launcher, shlex.join(command[1:]), *place))]
    print(f"{name}: {shlex.join(command)}\n  > {log}", flush=True)
    environment = {**os.environ, "MSRUN_TIME_LIMIT": str(options.seconds)}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                timeout=options.seconds + 60,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {options.seconds + 60} s; {log} shows how far it came"
    return None if done.returncode == 0 else f"status {done.returncode}; {log} ends: {_end(log)}"


def _end(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "nothing was printed")[:200]


def flags_of(config: Path, output: Path, keys: dict[str, Any]) -> list[object]:
    """The flags of a training run with these keys."""
    settings = [f"--{key}={value}" for key, value in keys.items()]
    report = ("--set", "callbacks=[{type: Report, enabled: False}]")
    return ["--config", config, "--output_dir", output, *settings, *report]


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Its training steps."""
    from mixtral_ms.train.report.metrics import read_metrics  # noqa: PLC0415 - not for --help

    return [one for one in read_metrics(output / "metrics.jsonl") if one["kind"] == "train"]


def kernels(options: Options) -> Iterator[Row]:
    """The kernels' contracts on the device."""
    tests = ("tests/unit/kernels/test_kernels.py", "--device", options.device, "-q")
    failed = run(options, "kernels", ("-m", "pytest", *tests))
    yield Row("kernels", "FAILED" if failed else "passed", failed or _end(_log(options, "kernels")))


def _log(options: Options, name: str) -> Path:
    return options.output / f"{name}.log"


def tiny_losses(options: Options, devices: int) -> list[float] | str:
    """Losses of the tiny network on so many devices, or why there are none."""
    name, data = f"training-{devices}", options.output / TINY_DATA
    output = _fresh(options.output / name)
    grid = GRIDS[devices]
    keys = {
        "train_data": data,
        "use_parallel": devices > 1,
        "context.device_target": options.device,
        "runner_config.max_steps": STEPS,
        "runner_config.batch_size": 1,
        "runner_config.global_batch_size": GLOBAL_BATCH,
        "runner_config.peak_tflops": 1,  # measuring it would take longer than the run
        "train_dataset.data_loader.shuffle": False,
        "model.model_config.seq_length": TINY_LENGTH,
        "model.model_config.compute_dtype": "float32",
        "do_eval": False,
        **{f"parallel_config.{key}": size for key, size in grid.items()},
    }
    if "pipeline_stage" in grid:
        micro_batches = GLOBAL_BATCH // grid.get("data_parallel", 1)
        keys["parallel_config.micro_batch_num"] = micro_batches
    order = [ROOT / "run_mindformer.py", *flags_of(TINY, output, keys)]
    failed = run(options, name, order, devices)
    return failed or [one["loss"] for one in metrics_of(output)]


def _fresh(folder: Path) -> Path:
    """A folder for this attempt; an earlier one's stays beside it."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{time.time_ns()}"))
    return folder


def training(options: Options) -> Iterator[Row]:
    """The tiny network's losses beside the CPU's."""
    write_tiny_data(options)
    expected = json.loads(LOSSES.read_text(encoding="utf-8"))["losses"]
    bound = BOUNDS[options.device]
    for devices in options.devices:
        got = tiny_losses(options, devices)
        part = f"training, {devices} device{'s' if devices > 1 else ''}"
        if isinstance(got, str):
            yield Row(part, "FAILED", got)
            continue
        worst = max((abs(a - b) / b for a, b in zip(got, expected, strict=False)), default=1.0)
        good = len(got) == len(expected) and worst <= bound
        detail = f"{len(got)} steps, largest difference of a loss {worst:.1e} (bound {bound:.0e})"
        yield Row(part, "passed" if good else "FAILED", f"{detail}; last loss {got[-1]:.4f}")


def layer(options: Options) -> Iterator[Row]:
    """One layer of 8x7B: the memory that it takes and its step."""
    sizes = {"seq_length": 4096, "num_layers": 1}
    if options.device == "CPU":
        sizes |= {"seq_length": 128, "hidden_size": 256, "intermediate_size": 448}
    write_data(options.output / "layer.mindrecord", LAYER_STEPS, sizes["seq_length"], 32000)
    output = _fresh(options.output / "layer")
    keys = {
        "train_data": options.output / "layer.mindrecord",
        "context.device_target": options.device,
        "use_parallel": False,
        "runner_config.max_steps": LAYER_STEPS,
        **{f"model.model_config.{key}": size for key, size in sizes.items()},
        **{f"parallel_config.{key}": 1 for key in ("data_parallel", "expert_parallel")},
        **{f"parallel_config.{key}": 1 for key in ("pipeline_stage", "micro_batch_num")},
    }
    keys["parallel.enable_parallel_optimizer"] = False
    if options.device == "CPU":
        keys["runner_config.peak_tflops"] = 1
    order = [__file__, "--measure", options.output / "peak", *flags_of(LARGE, output, keys)]
    failed = run(options, "layer", order)
    if failed:
        yield Row("layer", "FAILED", failed)
        return
    seconds = sorted(one["step_time_ms"] / 1000 for one in metrics_of(output)[1:])
    what = ", ".join(f"{key} {size}" for key, size in sizes.items())
    peak = int((options.output / "peak").read_text()) / 2**30
    detail = f"peak {peak:.2f} GiB, step {seconds[len(seconds) // 2]:.3f} s (median of"
    detail += f" {len(seconds)}, {seconds[0]:.3f} to {seconds[-1]:.3f}); {what}"
    yield Row("layer", "measured", detail)


def measured(peak: Path, arguments: Sequence[str]) -> int:
    """Train in this process and leave the bytes that it took at most in the file `peak`."""
    import mindspore  # noqa: PLC0415 - not for --help

    from mixtral_ms.cli.commands import run as run_mode  # noqa: PLC0415

    status = run_mode.main(arguments)
    if mindspore.get_context("device_target") == "Ascend":
        taken = mindspore.runtime.max_memory_allocated()
    else:
        import resource  # noqa: PLC0415 - this system's

        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak.write_text(str(int(taken)))
    return status


def machine(options: Options) -> list[str]:
    """What the table was made on."""
    import mindspore  # noqa: PLC0415 - not for --help

    import mixtral_ms  # noqa: PLC0415

    cann = Path("/usr/local/Ascend/ascend-toolkit/latest/version.cfg")
    lines = [
        f"mixtral-ms {mixtral_ms.__version__}, MindSpore {mindspore.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, device {options.device}",
        f"CANN: {cann.read_text().split()[-1] if cann.is_file() else f'no {cann}'}",
    ]
    try:
        asked = subprocess.run(
            ["npu-smi", "info"], capture_output=True, text=True, timeout=60, check=False
        )
        lines += ["", "```", asked.stdout.strip(), "```"]
    except (OSError, subprocess.TimeoutExpired) as error:
        lines.append(f"npu-smi info: {error}")
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """In Markdown, for an issue."""
    cells = [f"| {row.part} | {row.verdict} | {row.detail.replace('|', '/')} |" for row in rows]
    return ["| part | result | detail |", "|---|---|---|", *cells]


def check(options: Options) -> int:
    """Run the parts, print and write the table; 1 when one failed."""
    options.output.mkdir(parents=True, exist_ok=True)
    run_part = {"kernels": kernels, "training": training, "layer": layer}
    rows = []
    for part in options.parts:
        for row in run_part[part](options):
            rows.append(row)
            print(f"  {row.part}: {row.verdict}: {row.detail}", flush=True)
    text = "\n".join([*machine(options), "", *table(rows), ""])
    report = options.output / "ascend_check.md"
    with write_aside(report) as path:
        path.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {report}: send it back in an issue, with the logs of what failed")
    return 1 if any(row.verdict == "FAILED" for row in rows) else 0


def store_losses(options: Options) -> int:
    """Make the file of losses anew, by one CPU process."""
    options.output.mkdir(parents=True, exist_ok=True)
    write_tiny_data(options)
    losses = tiny_losses(options, 1)
    if isinstance(losses, str):
        raise UserError(losses)
    with write_aside(LOSSES) as path:
        path.write_text(json.dumps({"losses": losses}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {LOSSES}")
    return 0


def options_of(given: argparse.Namespace) -> Options:
    """Checked."""
    try:
        devices = tuple(int(number) for number in given.devices.split(","))
    except ValueError:
        devices = ()
    if not devices or set(devices) - set(GRIDS):
        raise UserError(f"--devices {given.devices}: give some of {', '.join(map(str, GRIDS))}")
    parts = tuple(given.parts.split(","))
    if set(parts) - set(PARTS):
        raise UserError(f"--parts {given.parts}: give some of {', '.join(PARTS)}")
    return Options(given.device, devices, parts, given.output.resolve(), 60 * given.minutes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--measure"]:
        return measured(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(
        prog="ascend_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=tuple(BOUNDS), default="Ascend")
    parser.add_argument("--devices", default="1,2,8", help="of the training (default: 1,2,8)")
    parser.add_argument("--parts", default=",".join(PARTS), help="(default: all of them)")
    parser.add_argument(
        "--output", type=Path, default=Path("ascend_check"), help="folder (default: ascend_check)"
    )
    parser.add_argument("--minutes", type=int, default=30, help="for each run (default: 30)")
    parser.add_argument(
        "--store_losses", action="store_true", help="with --device CPU: make the losses anew"
    )
    given = parser.parse_args(arguments)
    options = options_of(given)
    if not given.store_losses:
        return check(options)
    if options.device != "CPU":
        raise UserError("--store_losses: the stored losses are a CPU's; give --device CPU")
    return store_losses(options)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
