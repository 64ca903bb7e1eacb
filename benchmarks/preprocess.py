"""Preprocessing, text to MindRecord: MB/s per core against peers, and memory against input size.

    python benchmarks/preprocess.py --data FOLDER [--seconds 300] [--skip_memory]

FOLDER holds real text as UTF-8 files (any *.tokens, *.txt, *.jsonl in it are joined into one plain
text). Every side does the same work end to end on one core: read the text, undo WikiText's spacing,
encode each document, add bos and eos, pack, write a MindRecord. The sides take turns in one run.
Prints tables in Markdown.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
from memory import status_bytes
from mindspore.mindrecord import FileWriter

from mixtral_ms.data.documents.preprocess_documents import PreprocessOptions, preprocess
from mixtral_ms.data.documents.wikitext import clean_wikitext
from mixtral_ms.data.mindrecord.record_header import index_of
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

SEQ_LENGTH = 4096
MODEL = str(find_example_tokenizer())
Encoder = Callable[[list[str]], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text files")
    parser.add_argument("--megabytes", type=float, default=40, help="text of one round")
    parser.add_argument("--seconds", type=float, default=300, help="time for the comparison")
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--measure_memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.measure_memory:
        measure_memory(*args.measure_memory)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(real_text(args.data, int(args.megabytes * 1e6)), encoding="utf-8")
        compare(text, args.seconds)
        if not args.skip_memory:
            memory_table(text, args.data)


def real_text(folder: Path, size: int) -> str:
    """About `size` bytes of the folder's text, repeated when there is less."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".tokens", ".txt"):
            parts.append(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line).values() if line.startswith("{") else ()
                parts += [one for one in values if isinstance(one, str) and len(one) > 60]
    text = "\n\n".join(parts)
    if not text:
        sys.exit(f"error: no text in {folder}")
    return (text * (size // len(text.encode()) + 1))[:size]


def ours(text: Path, backend: str, output: Path) -> int:
    """Tokens that our preprocessing writes."""
    summary = preprocess(
        PreprocessOptions(
            input_glob=str(text),
            model_file=MODEL,
            output_file=str(output),
            seq_length=SEQ_LENGTH,
            tokenizer_backend=backend,
            overwrite=True,
        )
    )
    return summary.records * (SEQ_LENGTH + 1)


def plain(text: Path, encode: Encoder, output: Path) -> int:
    """The same by a plain script: whole file in memory, documents encoded in one call."""
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text.read_text(encoding="utf-8"))
    stripped = (one.strip() for one in paragraphs)
    documents = [clean_wikitext(f" {one} ").strip() for one in stripped if one and one[0] != "="]
    ids: list[int] = []
    for one in encode(documents):
        ids += [1, *one, 2]
    rows = len(ids) // (SEQ_LENGTH + 1)
    packed = np.array(ids[: rows * (SEQ_LENGTH + 1)], np.int32).reshape(rows, -1)
    for old in (output, index_of(output)):
        old.unlink(missing_ok=True)
    writer = FileWriter(str(output))
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "plain")
    for start in range(0, rows, 1000):
        writer.write_raw_data([{"input_ids": row} for row in packed[start : start + 1000]])
    writer.commit()
    return packed.size


def sides() -> dict[str, Callable[[Path, Path], int]]:
    """What is compared, by name; each takes the text and where to write."""
    processor = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    table: dict[str, Callable[[Path, Path], int]] = {
        "ours": lambda text, out: ours(text, "auto", out),
        "ours, kitoken": lambda text, out: ours(text, "kitoken", out),
        "plain sentencepiece": lambda text, out: plain(
            text, lambda many: processor.encode(many, num_threads=1), out
        ),
    }
    try:
        from transformers import LlamaTokenizerFast  # noqa: PLC0415 - a peer, not a dependency

        fast = hugging_face_tokenizer(LlamaTokenizerFast)
        table["HF fast tokenizer"] = lambda text, out: plain(
            text, lambda many: fast(many, add_special_tokens=False)["input_ids"], out
        )
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
    return table


def hugging_face_tokenizer(kind: type) -> Callable:
    """transformers' fast tokenizer of the model, from a folder as a user would have it."""
    folder = tempfile.mkdtemp()
    link = Path(folder) / "tokenizer.model"
    link.symlink_to(MODEL)
    return kind.from_pretrained(folder, add_prefix_space=True, legacy=True)


def compare(text: Path, seconds: float) -> None:
    megabytes = text.stat().st_size / 1e6
    table = sides()
    cpu: dict[str, list[float]] = {name: [] for name in table}
    wall: dict[str, list[float]] = {name: [] for name in table}
    tokens: dict[str, int] = {}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(cpu["ours"]) < 3:
        for name, run in table.items():
            start_cpu, start = time.process_time(), time.perf_counter()
            tokens[name] = run(text, text.parent / "out")
            cpu[name].append(time.process_time() - start_cpu)
            wall[name].append(time.perf_counter() - start)
    base = statistics.median(cpu["plain sentencepiece"])
    rounds = len(cpu["ours"])
    print(f"\n{megabytes:.1f} MB of text, seq_length {SEQ_LENGTH}, median of {rounds} rounds\n")
    print("| end to end | MB/s of CPU time | MB/s of wall time | against plain sentencepiece |")
    print("|---|---|---|---|")
    for name in table:
        spent = statistics.median(cpu[name])
        rate = megabytes / statistics.median(wall[name])
        print(f"| {name} | {megabytes / spent:.2f} | {rate:.2f} | {base / spent:.2f}x |")
    print(f"\ntokens written: {', '.join(f'{name} {count:,}' for name, count in tokens.items())}")


def memory_table(text: Path, data: Path) -> None:
    """Peak memory of a process of its own for inputs of growing size."""
    print("\n| input | peak memory | of which before reading |")
    print("|---|---|---|")
    content = text.read_bytes()
    for megabytes in (5, 50, 500):
        big = text.parent / "big.txt"
        with open(big, "wb") as file:
            for _ in range(max(1, round(megabytes * 1e6 / len(content)))):
                file.write(content[: int(megabytes * 1e6)] + b"\n\n")
        command = [sys.executable, __file__, "--data", str(data), "--measure_memory"]
        done = subprocess.run(
            [*command, str(big), str(text.parent / "big.mindrecord")],
            capture_output=True,
            text=True,
            check=True,
        )
        before, peak = done.stdout.split()[-2:]
        print(f"| {big.stat().st_size / 1e6:.0f} MB | {peak} MB | {before} MB |", flush=True)


def measure_memory(text: str, output: str) -> None:
    before = status_bytes("VmHWM")
    ours(Path(text), "auto", Path(output))
    print(before // 1_000_000, status_bytes("VmHWM") // 1_000_000)


if __name__ == "__main__":
    main()
