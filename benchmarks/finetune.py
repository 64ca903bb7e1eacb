"""Full fine-tuning beside LoRA: trained parameters, peak memory and step time, alternating.

Each contender is a process of its own that stays up; the parent has them take steps in turn, so
that whatever else the machine does hits all alike. Time goes into the table as a median.

example:
  python benchmarks/finetune.py --steps 7
"""

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
from memory import status_bytes

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_layers": 4,
    "num_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 32000,
    "batch_size": 4,
    "seq_length": 256,
    "pad_token_id": -1,
    "compute_dtype": "float32",
}
ATTENTION, EXPERTS = ".*wq|.*wk|.*wv|.*wo", ".*w1|.*w2|.*w3"
CONTENDERS = {
    "full": None,
    "LoRA of attention": ATTENTION,
    "LoRA of attention and experts": f"{ATTENTION}|{EXPERTS}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (default 7)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.rank)
    else:
        compare(args.steps, args.rank)


def compare(steps: int, rank: int) -> None:
    """Start a process for each contender, let them step in turn, print the table."""
    workers = {name: start(name, rank) for name in CONTENDERS}
    trained = {name: int(ask(worker, "")) for name, worker in workers.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(steps):
        for name, worker in workers.items():
            times[name].append(float(ask(worker, "step")))
    peaks = {name: int(ask(worker, "peak")) for name, worker in workers.items()}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    base = statistics.median(times["full"])
    print(f"{'':32}{'trained':>14}{'peak MB':>10}{'of full':>9}{'step ms':>10}{'of full':>9}")
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{name:32}{trained[name]:>14,}{peaks[name] / 1e6:>10,.0f}"
            f"{peaks[name] / peaks['full']:>9.2f}{middle:>10,.0f}{middle / base:>9.2f}"
        )


def start(name: str, rank: int) -> subprocess.Popen:
    """A worker's process; one at a time does its first step, which compiles."""
    command = [sys.executable, __file__, "--worker", name, "--rank", str(rank)]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    print(f"{name} ready: {worker.stdout.readline().strip()}", flush=True)
    return worker


def ask(worker: subprocess.Popen, question: str) -> str:
    """A worker's answer to one line."""
    worker.stdin.write(question + "\n")
    worker.stdin.flush()
    return worker.stdout.readline()


def serve(name: str, rank: int) -> None:
    """Answer the parent: "step" with milliseconds, "peak" with bytes, else what is trained."""
    import mindspore  # noqa: PLC0415 - the parent needs none of it

    from mixtral_ms.config.model import MixtralConfig, MoEConfig  # noqa: PLC0415
    from mixtral_ms.config.pet_section import PetSection  # noqa: PLC0415
    from mixtral_ms.data.batch import Batch  # noqa: PLC0415
    from mixtral_ms.model.mixtral import MixtralForCausalLM  # noqa: PLC0415
    from mixtral_ms.train.optimizer import AdamW  # noqa: PLC0415
    from mixtral_ms.train.step import TrainStep  # noqa: PLC0415

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    pattern = CONTENDERS[name]
    pet = pattern and PetSection(lora_rank=rank, lora_dropout=0.0, target_modules=pattern)
    config = MixtralConfig(**SIZES, moe_config=MoEConfig(), pet_config=pet)
    network = MixtralForCausalLM(config)
    step = TrainStep(network, AdamW(network.trainable_params()))
    shape = (config.batch_size, config.seq_length + 1)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, shape).astype(np.int32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), None)
    print(f"loss {step([batch], 1e-4).loss:.4f}", flush=True)
    for question in sys.stdin:
        if question == "step\n":
            began = time.monotonic()
            step([batch], 1e-4)
            print(f"{(time.monotonic() - began) * 1e3:.1f}", flush=True)
        elif question == "peak\n":
            print(status_bytes("VmHWM"), flush=True)
        else:
            print(sum(one.size for one in network.trainable_params()), flush=True)


if __name__ == "__main__":
    main()
