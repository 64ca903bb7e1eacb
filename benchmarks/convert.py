"""Conversion and resharding at 8x7B's true tensor sizes: speed beside plain copying, peak memory.

    python benchmarks/convert.py --folder EMPTY_FOLDER            # about 35 GB of disk at a time

A Hugging Face checkpoint of a few layers is written with random values, in shards. Then, in turns:
  copy        reads the same files, takes the same SHA-256 and writes them again
  convert     Hugging Face -> mixtral-ms
  reshard     one rank -> 8 (dp2 mp2 pp2 ep2) -> one rank
  mindspore   the same by mindspore.transform_checkpoints, on --mindspore_layers layers, because it
              holds the model several times; ours on the same files beside it
Each side is a process of its own. Prints tables in Markdown, medians of --rounds.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from memory import AnonymousPeak

from mixtral_ms.checkpoint.formats.safetensors_format import write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import OutgoingTensor, TensorInfo

ROOT = Path(__file__).parents[1]
HIDDEN, WIDTH, EXPERTS, KEY_VALUE, VOCABULARY = 4096, 14336, 8, 1024, 32000
SHARD_BYTES = 1 << 30
PIECE = 1 << 24
GRID = "dp=2,mp=2,ep=2,pp=2,zero=1"
GRID_OF_ONE_LAYER = "dp=4,mp=2,ep=4,zero=1"
TIMEOUT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--layers", type=int, default=2, help="0 leaves this part out")
    parser.add_argument("--mindspore_layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mindspore", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copy:
        copy_folder(*args.copy)
    elif args.mindspore:
        mindspore_transform(*args.mindspore)
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        if args.layers:
            conversion(args.folder, args.layers, args.rounds)
        resharding(args.folder, args.mindspore_layers, args.rounds)


def conversion(folder: Path, layers: int, rounds: int) -> None:
    source, ours = folder / "hf", folder / "ours"
    size = write_checkpoint(source, layers)
    table = {
        "copy": (copying(source, folder / "copy"), folder / "copy"),
        "convert": (converting(source, ours), ours),
    }
    report(f"Hugging Face -> mixtral-ms, {layers} layers", size, rounds, table, keep={"ours"})
    split = folder / "split"
    run(transforming(ours, split, GRID))
    size = sum(path.stat().st_size for path in split.rglob("*") if path.is_file())
    table = {
        "copy of the 8 ranks": (copying(split, folder / "copy"), folder / "copy"),
        "reshard 1 -> 8": (transforming(ours, folder / "split_2", GRID), folder / "split_2"),
        "reshard 8 -> 1": (transforming(split, folder / "whole", None), folder / "whole"),
    }
    report(f"One rank -> 8 -> one, {layers} layers", size, rounds, table)
    for path in (source, ours, split):
        shutil.rmtree(path)


def resharding(folder: Path, layers: int, rounds: int) -> None:
    """Beside MindSpore's own tool."""
    grid = GRID if layers > 1 else GRID_OF_ONE_LAYER
    source, ours, split = folder / "hf", folder / "ours", folder / "split"
    size = write_checkpoint(source, layers)
    run(converting(source, ours))
    run(transforming(ours, split, grid))
    strategy = str(split / "strategy")
    to_8 = mindspore_command(ours, folder / "ms_split", "", strategy)
    to_1 = mindspore_command(split, folder / "ms_whole", strategy, "")
    report(
        f"One rank -> 8, {layers} layer",
        size,
        rounds,
        {
            "mixtral-ms": (transforming(ours, folder / "split_2", grid), folder / "split_2"),
            "mindspore": (to_8, folder / "ms_split"),
        },
    )
    report(
        f"8 ranks -> one, {layers} layer",
        size,
        rounds,
        {
            "mixtral-ms": (transforming(split, folder / "whole", None), folder / "whole"),
            "mindspore": (to_1, folder / "ms_whole"),
        },
    )
    for path in (source, ours, split):
        shutil.rmtree(path)


def report(
    title: str,
    size: int,
    rounds: int,
    table: dict[str, tuple[list[str], Path]],
    keep: set[str] = frozenset(),
) -> None:
    """Run the sides in turns; the first is what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in table}
    peaks: dict[str, int] = dict.fromkeys(table, 0)
    for _ in range(rounds):
        for name, (command, output) in table.items():
            shutil.rmtree(output, ignore_errors=True)
            spent, peak = run(command)
            seconds[name].append(spent)
            peaks[name] = max(peaks[name], peak)
    base = statistics.median(next(iter(seconds.values())))
    print(f"\n{title}, {size / 1e9:.1f} GB, median of {rounds}\n")
    print("| side | s | GB/s | speed | peak anonymous MB |")
    print("|---|---|---|---|---|")
    for name in table:
        spent = statistics.median(seconds[name])
        rate = f"{size / spent / 1e9:.2f}"
        print(f"| {name} | {spent:.1f} | {rate} | {base / spent:.2f} | {peaks[name] / 1e6:.0f} |")
    sys.stdout.flush()
    for _, output in table.values():
        if output.name not in keep:
            shutil.rmtree(output, ignore_errors=True)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous memory of a process."""
    os.sync()  # what the side before has left to write is not this one's
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sampler = AnonymousPeak(process.pid)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return time.perf_counter() - start, sampler.peak


def copying(source: Path, target: Path) -> list[str]:
    return [sys.executable, __file__, "--folder", ".", "--copy", str(source), str(target)]


def converting(source: Path, target: Path) -> list[str]:
    command = [sys.executable, "convert_weight.py", "--model", "mixtral"]
    return [*command, "--input_path", str(source), "--output_path", str(target)]


def transforming(source: Path, target: Path, grid: str | None) -> list[str]:
    command = [sys.executable, "tools/transform_ckpt.py", "--src_ckpt_dir", str(source)]
    command += ["--dst_ckpt_dir", str(target)]
    if grid:
        return [*command, "--dst_strategy", grid]
    return [*command, "--src_ckpt_strategy", str(source / "strategy")]


def mindspore_command(source: Path, target: Path, *strategies: str) -> list[str]:
    command = [sys.executable, __file__, "--folder", ".", "--mindspore"]
    return [*command, str(source), str(target), *strategies]


def mindspore_transform(source: str, target: str, before: str, after: str) -> None:
    import mindspore

    def merged(folder: str) -> str | None:
        if not folder:
            return None
        file = f"{target}-{Path(folder).parent.name}.ckpt"
        mindspore.merge_pipeline_strategys(folder, file)
        return file

    Path(target).mkdir()
    mindspore.transform_checkpoints(
        source, target, "checkpoint_", merged(before), merged(after), output_format="safetensors"
    )


def copy_folder(source: Path, target: Path) -> None:
    """Copy with a SHA-256 of what is copied, flushed to disk."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(path, "rb") as read, open(to, "wb") as written:
            while piece := read.read(PIECE):
                digest.update(piece)
                written.write(piece)
            written.flush()
            os.fsync(written.fileno())


def write_checkpoint(folder: Path, layers: int) -> int:
    """A Hugging Face folder of random bfloat16 values; returns its bytes."""
    folder.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[OutgoingTensor]] = [[]]
    for name, shape in shapes(layers).items():
        tensor = OutgoingTensor(name, TensorInfo(shape, "bfloat16"), values(shape))
        if sum(t.info.nbytes for t in shards[-1]) + tensor.info.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        write_safetensors(folder / file, tensors, {"format": "pt"})
    size = sum(t.info.nbytes for shard in shards for t in shard)
    names = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = (HIDDEN,)
        found[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KEY_VALUE), ("v", KEY_VALUE), ("o", HIDDEN)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        found[layer + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            prefix = f"{layer}block_sparse_moe.experts.{expert}."
            found[prefix + "w1.weight"] = found[prefix + "w3.weight"] = (WIDTH, HIDDEN)
            found[prefix + "w2.weight"] = (HIDDEN, WIDTH)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def values(shape: tuple[int, ...]) -> Callable[[], Iterator[np.ndarray]]:
    """Pieces of bfloat16 bits between -2 and 2, of no pattern that a disk could compress."""

    def pieces() -> Iterator[np.ndarray]:
        left, random = int(np.prod(shape)), np.random.default_rng(seed_of(shape))
        while left:
            count = min(left, PIECE)
            yield random.integers(0, 0x4000, count, np.uint16) | random.integers(
                0, 2, count, np.uint16
            ) * np.uint16(0x8000)
            left -= count

    return pieces


def seed_of(shape: tuple[int, ...]) -> int:
    return hash(shape) & 0xFFFF


if __name__ == "__main__":
    main()
