"""Training step (forward, backward, AdamW) of mixtral-ms beside transformers, alternating.

Each contender is a process of its own that stays up; the parent has them take steps in turn, so
that whatever else the machine does hits all alike, and reports medians and peak memory.

example:
  python benchmarks/train_step.py                      # the comparison
  python benchmarks/train_step.py --sweep seq_length   # ours, growing one size
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_layers": 8,
    "num_heads": 8,
    "n_kv_heads": 2,
    "expert_num": 8,
    "vocab_size": 32000,
    "batch_size": 2,
    "seq_length": 512,
}
CONTENDERS = {
    "torch": "transformers, grouped_mm, fused AdamW",
    "cpp-dropless": "mixtral-ms, C++ kernels, dropless",
    "cpp-capacity": "mixtral-ms, C++ kernels, capacity 1.25",
    "plain-dropless": "mixtral-ms, without a compiler, dropless",
    "plain-capacity": "mixtral-ms, without a compiler, capacity 1.25",
}
SWEEPS = {
    "seq_length": [{"seq_length": s, "batch_size": 1} for s in (128, 256, 512, 1024, 2048, 4096)],
    # the same active parameters: two of more, equally wide experts
    "expert_num": [{"expert_num": e, "num_layers": 2} for e in (4, 8, 16, 32, 64)],
    "num_layers": [
        {"num_layers": n, "hidden_size": 64, "intermediate_size": 128, "seq_length": 64}
        for n in (2, 4, 8, 16, 32)
    ],
}
START_TIMEOUT_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (default 7)")
    parser.add_argument("--sweep", choices=SWEEPS)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, SIZES | args.sizes)
    elif args.sweep:
        sweep(args.sweep, args.steps)
    else:
        compare(args.contenders, args.steps)


def compare(names: list[str], steps: int) -> None:
    workers = [Worker(name, {}) for name in names]
    gemm = statistics.median([worker.ask("gemm") for worker in workers if worker.name != "torch"])
    for worker in workers:
        worker.ask("step"), worker.ask("step")
    times = {worker.name: [] for worker in workers}
    for _ in range(steps):
        for worker in workers:
            times[worker.name].append(worker.ask("step"))
    base = statistics.median(times["torch"]) if "torch" in times else None
    tokens = SIZES["batch_size"] * SIZES["seq_length"]
    base_memory = next((w.ask("memory") for w in workers if w.name == "torch"), None)
    flops = tokens * workers[-1].ask("flops") if workers[-1].name != "torch" else None
    print(f"MindSpore MatMul of 2048 x 2048: {gemm / 1e9:.0f} GFLOP/s")
    print("| contender | s/step | tokens/s | ratio | share of MatMul peak | peak MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for worker in workers:
        seconds, memory = statistics.median(times[worker.name]), worker.ask("memory")
        print(
            f"| {CONTENDERS[worker.name]} | {seconds:.3f} | {tokens / seconds:.0f} "
            f"| {base / seconds if base else 1:.2f} "
            f"| {flops / seconds / gemm if flops else 0:.0%} "
            f"| {memory / 1e6:.0f} | {memory / base_memory if base_memory else 1:.2f} |"
        )
        worker.close()


def sweep(name: str, steps: int) -> None:
    print(f"| {name} | first step (compiles), s | s/step | tokens/s | peak MB |")
    print("|---|---|---|---|---|")
    for sizes in SWEEPS[name]:
        worker = Worker("cpp-dropless", sizes)
        first = worker.ask("step")
        worker.ask("step")
        seconds = statistics.median([worker.ask("step") for _ in range(steps)])
        all_sizes = SIZES | sizes
        tokens = all_sizes["batch_size"] * all_sizes["seq_length"]
        memory = worker.ask("memory") / 1e6
        print(
            f"| {sizes[name]} | {first:.1f} | {seconds:.3f} | {tokens / seconds:.0f} "
            f"| {memory:.0f} |",
            flush=True,
        )
        worker.close()


class Worker:
    """A contender's process; answers one number a question."""

    def __init__(self, name: str, sizes: dict) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", name, "--sizes", json.dumps(sizes)]
        native = "0" if name.startswith("plain") else "auto"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"MIXTRAL_MS_NATIVE": native},
        )

    def ask(self, question: str) -> float:
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return float(line.split()[1])
        raise RuntimeError(f"the worker of {self.name} ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(START_TIMEOUT_S)


def serve(name: str, sizes: dict) -> None:
    answers = build_torch(sizes) if name == "torch" else build_ours(name, sizes)
    answers["memory"] = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in sys.stdin:
        print("ANSWER", answers[line.strip()](), flush=True)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def build_torch(sizes: dict) -> dict:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        num_local_experts=sizes["expert_num"],
        num_experts_per_tok=2,
    )
    config._experts_implementation = "grouped_mm"
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (sizes["batch_size"], sizes["seq_length"])
    ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"step": lambda: timed(step)}


def build_ours(name: str, sizes: dict) -> dict:
    import mindspore
    import numpy as np
    from mindspore import Tensor, ops

    from mixtral_ms.config import MixtralConfig
    from mixtral_ms.data.loader.batch import Batch
    from mixtral_ms.model.mixtral import MixtralForCausalLM
    from mixtral_ms.train.report.flops import flops_per_token
    from mixtral_ms.train.step.adamw import AdamW
    from mixtral_ms.train.step.train_step import TrainStep

    mindspore.set_context(mode=0)
    mindspore.set_device("CPU")
    experts = {
        "expert_num": sizes["expert_num"],
        "capacity_factor": 1.25 if name.endswith("capacity") else -1.0,
    }
    others = {key: value for key, value in sizes.items() if key != "expert_num"}
    config = MixtralConfig(
        **others, compute_dtype="float32", pad_token_id=-1, theta=1e6, moe_config=experts
    )
    network = MixtralForCausalLM(config)
    train_step = TrainStep(network, AdamW(network.trainable_params()))
    shape = (sizes["batch_size"], sizes["seq_length"] + 1)
    ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], shape).astype(np.int32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
    square = Tensor(np.random.default_rng(0).standard_normal((2048, 2048), np.float32))

    def gemm() -> float:
        seconds = min(timed(lambda: ops.matmul(square, square).asnumpy()) for _ in range(5))
        return 2 * 2048**3 / seconds

    return {
        "step": lambda: timed(lambda: train_step([batch], 1e-4)),
        "gemm": gemm,
        "flops": lambda: flops_per_token(config, config.seq_length)["total"],
    }


if __name__ == "__main__":
    main()
