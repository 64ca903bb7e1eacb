"""Full fine-tuning beside LoRA: trained parameters, peak memory and step time, alternating.

With --packing, full fine-tuning on the 999 Alpaca rows of --data instead, one row a record beside
several: padding, step time and the tokens that do work. Tokens of a step are an epoch's mean, so
that the figure does not hang on which rows the timed steps met.

Each contender is a process of its own that stays up; the parent has them take steps in turn, so
that whatever else the machine does hits all alike. Time goes into the table as a median.

example:
  python benchmarks/finetune.py --steps 7
  python benchmarks/finetune.py --steps 7 --packing --data FOLDER
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

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
ON_ROWS = SIZES | {"batch_size": 2, "seq_length": 1024, "pad_token_id": 0}
RECORDS = {"one row a record": False, "packed": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (default 7)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--packing", action="store_true", help="compare records, not adapters")
    parser.add_argument("--data", type=Path, help="folder with alpaca/alpaca_en_999.json")
    parser.add_argument("--worker", choices=[*CONTENDERS, *RECORDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.packing and not args.data:
        parser.error("--packing needs --data")
    if args.worker in RECORDS:
        serve_rows(args.worker, args.data)
    elif args.worker:
        serve_random(args.worker, args.rank)
    elif args.packing:
        compare_records(args.steps, args.data)
    else:
        compare_adapters(args.steps, args.rank)


def compare_adapters(steps: int, rank: int) -> None:
    """The table of trained parameters, memory and time."""
    workers = {name: start(name, "--rank", rank) for name in CONTENDERS}
    trained = {name: int(ask(worker, "facts")) for name, worker in workers.items()}
    times = take_turns(workers, steps)
    peaks = {name: int(ask(worker, "peak")) for name, worker in workers.items()}
    stop(workers)
    base = statistics.median(times["full"])
    print(f"{'':32}{'trained':>14}{'peak MB':>10}{'of full':>9}{'step ms':>10}{'of full':>9}")
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{name:32}{trained[name]:>14,}{peaks[name] / 1e6:>10,.0f}"
            f"{peaks[name] / peaks['full']:>9.2f}{middle:>10,.0f}{middle / base:>9.2f}"
        )


def compare_records(steps: int, data: Path) -> None:
    """The table of padding, time and tokens/s."""
    workers = {name: start(name, "--data", data) for name in RECORDS}
    facts = {
        name: [int(n) for n in ask(worker, "facts").split()] for name, worker in workers.items()
    }
    times = take_turns(workers, steps)
    stop(workers)
    print("| | records | of which padding | ms/step | supervised tokens/s | real tokens/s |")
    print("|---|---|---|---|---|---|")
    positions = ON_ROWS["seq_length"]
    speeds, filled = [], []
    for name, (records, supervised, real) in facts.items():
        middle = statistics.median(times[name])
        per_second = ON_ROWS["batch_size"] / records / middle * 1e3
        speeds.append(real * per_second)
        filled.append(real / records / positions)
        print(
            f"| {name} | {records} | {1 - filled[-1]:.1%} | {middle:,.0f} | "
            f"{supervised * per_second:,.0f} | {speeds[-1]:,.0f} |"
        )
    padding = [records * positions - real for records, _, real in facts.values()]
    print(f"\nPacking removes {1 - padding[1] / padding[0]:.1%} of the padding.")
    in_step, in_second = filled[1] / filled[0], speeds[1] / speeds[0]
    print(f"Real tokens: {in_step:.2f} times as many in a step, {in_second:.2f} in a second.")


def take_turns(workers: dict[str, subprocess.Popen], steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each worker."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(steps):
        for name, worker in workers.items():
            times[name].append(float(ask(worker, "step")))
    return times


def stop(workers: dict[str, subprocess.Popen]) -> None:
    """End the workers, which end with their input."""
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def start(name: str, *options: object) -> subprocess.Popen:
    """A worker's process; one at a time does its first step, which compiles."""
    command = [sys.executable, __file__, "--worker", name, *map(str, options)]
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


def serve_random(name: str, rank: int) -> None:
    """A worker on random ids; its facts are how many parameters it trains."""
    from mixtral_ms.config.sections.lora_section import PetSection
    from mixtral_ms.data.loader.batch import Batch

    pattern = CONTENDERS[name]
    pet = pattern and PetSection(lora_rank=rank, lora_dropout=0.0, target_modules=pattern)
    shape = (SIZES["batch_size"], SIZES["seq_length"] + 1)
    ids = np.random.default_rng(0).integers(1, SIZES["vocab_size"], shape).astype(np.int32)
    step = make_step(SIZES, pet)
    trained = sum(one.size for one in step.network.trainable_params())
    answer(step, itertools.repeat(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), None)), str(trained))


def serve_rows(name: str, data: Path) -> None:
    """A worker on real rows; its facts are records, supervised and real tokens of an epoch."""
    from mixtral_ms.config.sections.data_section import DataLoaderSection, DatasetSection
    from mixtral_ms.data.loader.record_loader import RecordLoader
    from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

    source = DataLoaderSection(
        type="ConversationDataset",
        dataset_dir=str(data / "alpaca" / "alpaca_en_999.json"),
        packing=RECORDS[name],
    )
    loader = RecordLoader(
        DatasetSection(data_loader=source),
        seq_length=ON_ROWS["seq_length"],
        batch_size=ON_ROWS["batch_size"],
        seed=0,
        shuffle=True,
        ignore_token_id=-100,
        pad_token_id=ON_ROWS["pad_token_id"],
        tokenizer_file=str(find_example_tokenizer()),
        keep_partial=True,
    )
    supervised = real = 0
    for batch in loader.batches(0):
        supervised += batch.supervised_tokens
        real += int((batch.input_ids != ON_ROWS["pad_token_id"]).sum())
    answer(make_step(ON_ROWS), loader.batches(0), f"{loader.records} {supervised} {real}")


def make_step(sizes: dict, pet=None):
    """A step of full or adapter training, in graph mode on the CPU."""
    import mindspore

    from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
    from mixtral_ms.model.mixtral import MixtralForCausalLM
    from mixtral_ms.train.step.adamw import AdamW
    from mixtral_ms.train.step.train_step import TrainStep

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    config = MixtralConfig(**sizes, moe_config=MoEConfig(), pet_config=pet)
    network = MixtralForCausalLM(config)
    return TrainStep(network, AdamW(network.trainable_params()))


def answer(step, batches, facts: str) -> None:
    """Answer the parent: "step" with milliseconds, "peak" with bytes, "facts"."""
    print(f"loss {step([next(batches)], 1e-4).loss:.4f}", flush=True)
    for question in sys.stdin:
        if question == "step\n":
            batch = next(batches)
            began = time.monotonic()
            step([batch], 1e-4)
            print(f"{(time.monotonic() - began) * 1e3:.1f}", flush=True)
        elif question == "peak\n":
            print(status_bytes("VmHWM"), flush=True)
        else:
            print(facts, flush=True)


if __name__ == "__main__":
    main()
