"""Generation on the CPU: prefill and decode of mixtral-ms beside transformers and llama.cpp.

Each contender is a process of its own that stays up; the parent has them take turns, so that
whatever else the machine does hits all alike, and reports medians. The memory bandwidth is
measured in the same run, between the turns.

examples:
  python benchmarks/generate.py
  python benchmarks/generate.py --weight_dtype int8 --llama_python LLAMA_VENV/bin/python
  python benchmarks/generate.py --sweep context --contenders ours
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from generate_contenders import CONTENDERS, SIZES, read_bandwidth

PROMPT, ANSWER = 512, 64
NAMES = {"ours": "mixtral-ms", "torch": "transformers", "llama": "llama.cpp"}
BYTES = {"float32": 4, "float16": 2, "int8": 1}
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
SWEEP_ANSWER = 16
END_TIMEOUT_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "torch"])
    parser.add_argument(
        "--weight_dtype",
        choices=BYTES,
        default="float32",
        help="of mixtral-ms and llama.cpp (there int8 is q8_0); transformers has float32",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each (default 5)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default 1 8")
    parser.add_argument("--sweep", choices=("context", "batch"))
    parser.add_argument(
        "--llama_python", help="a Python that has llama-cpp-python and gguf; adds llama.cpp"
    )
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(CONTENDERS[args.worker](args.weight_dtype))
    names = [*args.contenders, *(["llama"] if args.llama_python else [])]
    workers = [Worker(n, args.weight_dtype, args.llama_python) for n in dict.fromkeys(names)]
    check_same(workers, args.weight_dtype)
    if args.sweep:
        sweep(args.sweep, workers, args.repeats)
    else:
        compare(workers, args.weight_dtype, args.batch, args.repeats)
    for worker in workers:
        worker.close()
    return None


def check_same(workers: list["Worker"], weight_dtype: str) -> None:
    """All must find the same likeliest token after a prompt: they run the same network."""
    found = {worker.name: int(worker.ask("first", PROMPT)) for worker in workers}
    if weight_dtype == "float32" and len(set(found.values())) > 1:
        sys.exit(f"the contenders do not compute the same: likeliest tokens {found}")


def take_turns(workers: list["Worker"], repeats: int, *question: object) -> dict[str, float]:
    """Median seconds of each worker."""
    for worker in workers:
        worker.ask(*question)
    times = {worker.name: [] for worker in workers}
    for _ in range(repeats):
        for worker in workers:
            times[worker.name].append(worker.ask(*question))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(workers: list["Worker"], weight_dtype: str, batches: list[int], repeats: int) -> None:
    print(f"weights: {weight_dtype}; transformers float32, sdpa, fastest experts_implementation")
    print("| | contender | tokens/s | against transformers | read, GB/s | of bandwidth |")
    print("|---|---|---|---|---|---|")
    bandwidths = []
    for batch in batches:
        seconds = take_turns(workers, repeats, "prefill", batch, PROMPT)
        print_rows(f"prefill {PROMPT}, batch {batch}", seconds, batch * PROMPT)
    for batch in batches:
        seconds = take_turns(workers, repeats, "decode", batch, PROMPT, ANSWER)
        bandwidths.append(read_bandwidth())
        read = {name: ANSWER * bytes_per_step(name, weight_dtype, batch) for name in seconds}
        title = f"decode {ANSWER} after {PROMPT}, batch {batch}"
        print_rows(title, seconds, batch * ANSWER, read, bandwidths[-1])
    print("memory bandwidth, all threads reading: ", end="")
    print(*(f"{b / 1e9:.1f} GB/s" for b in bandwidths), sep=", ")


def print_rows(
    title: str,
    seconds: dict[str, float],
    tokens: int,
    read: dict[str, float] | None = None,
    bandwidth: float = 1.0,
) -> None:
    for name, each in seconds.items():
        ratio = f"{seconds['torch'] / each:.2f}" if "torch" in seconds else ""
        speed = read[name] / each if read else None
        shares = f"{speed / 1e9:.1f} | {speed / bandwidth:.0%}" if speed else " | "
        print(f"| {title} | {NAMES[name]} | {tokens / each:.1f} | {ratio} | {shares} |", flush=True)


def bytes_per_step(name: str, weight_dtype: str, batch: int) -> float:
    """Weights and cache that a decode step must read.

    Of several tokens, the expected number of different experts when the router is even.
    """
    s, width = SIZES, 4 if name == "torch" else BYTES[weight_dtype]
    key = s["n_kv_heads"] * s["head_dim"]
    attention = 2 * s["hidden_size"] * (s["num_heads"] * s["head_dim"] + key)
    active = s["experts"] * (1 - (1 - s["top_k"] / s["experts"]) ** batch)
    experts = active * 3 * s["hidden_size"] * s["intermediate_size"]
    head = s["vocab_size"] * s["hidden_size"]
    cache = batch * s["num_layers"] * 2 * key * (PROMPT + ANSWER / 2)
    weights = s["num_layers"] * (attention + experts) + head
    return width * weights + (2 if name == "llama" else 4) * cache


def sweep(what: str, workers: list["Worker"], repeats: int) -> None:
    cases = [(1, c) for c in CONTEXTS] if what == "context" else [(b, 256) for b in BATCHES]
    print(f"| {what} | contender | prefill, tokens/s | decode, ms/step | decode, tokens/s |")
    print("|---|---|---|---|---|")
    for batch, context in cases:
        prefill = take_turns(workers, repeats, "prefill", batch, context)
        decode = take_turns(workers, repeats, "decode", batch, context, SWEEP_ANSWER)
        for name in prefill:
            print(
                f"| {context if what == 'context' else batch} | {NAMES[name]} "
                f"| {batch * context / prefill[name]:.0f} "
                f"| {1e3 * decode[name] / SWEEP_ANSWER:.2f} "
                f"| {batch * SWEEP_ANSWER / decode[name]:.1f} |",
                flush=True,
            )


class Worker:
    """A contender's process; answers one number a question."""

    def __init__(self, name: str, weight_dtype: str, llama_python: str | None) -> None:
        self.name = name
        python = llama_python if name == "llama" and llama_python else sys.executable
        folder = Path(__file__).resolve().parent
        paths = [str(folder), *([] if name == "llama" else [str(folder.parent)])]
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, "--weight_dtype", weight_dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, *question: object) -> float:
        self.process.stdin.write(" ".join(map(str, question)) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return float(line.split()[1])
        raise RuntimeError(f"the worker of {self.name} ended")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(END_TIMEOUT_S)


def serve(contender: object) -> None:
    for line in sys.stdin:
        what, *numbers = line.split()
        print("ANSWER", getattr(contender, what)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
