"""Preprocessing conversations: rows/s against a plain loop over sentencepiece, and flat memory.

    python benchmarks/preprocess_qa.py [--rows 52000] [--seq_length 1024] [--rounds 3]

Rows are made up, of the lengths of Alpaca's. Both sides do the same work end to end on one core:
read the JSON, render the conversation template, encode, mask the questions, pad, write a MindRecord
with input_ids and labels. The plain loop does it as MindFormers' llama_preprocess.py does, with
sentencepiece in place of its slower tokenizer: it encodes each round for its ids, once more for its
length, and the instruction for the length of the mask, and writes record by record. The sides take
turns in one run; then growing parts of the rows are preprocessed in processes of their own.
Prints tables in Markdown.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sentencepiece
from fastchat.conversation import get_conv_template
from memory import status_bytes
from mindspore.mindrecord import FileWriter

from mixtral_ms.data.conversations.alpaca_prompt import alpaca_prompt
from mixtral_ms.data.conversations.preprocess_conversations import QaOptions, preprocess_qa
from mixtral_ms.data.mindrecord.record_header import index_of
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

MODEL = str(find_example_tokenizer())
SYLLABLES = re.findall("..", "anbecordafilgenhorinjuskalumornespraquirentolurve")
PAD, EOS, IGNORED = 0, 2, -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=52000)
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure_memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        measure_memory(*args.measure_memory, args.seq_length)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(folder, args.rows, args.seq_length, args.rounds)
        memory_table(folder, args.rows, args.seq_length)


def write_rows(path: Path, rows: int) -> None:
    """Conversations as alpaca_converter.py writes them; words of two to four syllables."""
    chance = random.Random(0)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(2, 4))) for _ in range(5000)]

    def text(mean: float) -> str:
        return " ".join(chance.choices(words, k=max(1, int(chance.expovariate(1 / mean))))) + "."

    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            question = alpaca_prompt(text(10), text(12) if chance.random() < 0.4 else "")
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text(45)}]
            row = json.dumps({"id": str(number + 1), "conversations": turns})
            file.write(("[" if number == 0 else ",\n") + row)
        file.write("]")


def ours(path: Path, output: Path, seq_length: int, backend: str, packing: bool = False) -> int:
    """Supervised tokens that our preprocessing writes."""
    options = QaOptions(
        model_file=MODEL,
        seq_length=seq_length,
        tokenizer_backend=backend,
        input_glob=str(path),
        output_file=str(output),
        packing=packing,
        overwrite=True,
    )
    return preprocess_qa(options).supervised_tokens


def plain(path: Path, output: Path, seq_length: int) -> int:
    """The same by a plain loop."""
    processor = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    for old in (output, index_of(output)):
        old.unlink(missing_ok=True)
    writer = FileWriter(str(output))
    column = {"type": "int32", "shape": [-1]}
    writer.add_schema({"input_ids": column, "labels": column}, "plain")
    supervised = 0
    for row in json.loads(path.read_text(encoding="utf-8")):
        conversation = get_conv_template("vicuna_v1.1")
        for number, turn in enumerate(row["conversations"]):
            conversation.append_message(conversation.roles[number % 2], turn["value"])
        ids = [1]
        labels = [IGNORED]
        separator = conversation.sep + conversation.roles[1] + ": "
        for text in conversation.get_prompt().split(conversation.sep2)[:-1]:
            ids += [*processor.encode(text), EOS]
            length = len(processor.encode(text)) + 1
            instruction = len(processor.encode(text.split(separator)[0] + separator)) - 1
            labels += [IGNORED] * instruction + ids[len(ids) - length + instruction :]
        fill = seq_length + 1 - len(ids)
        record = {
            "input_ids": np.array((ids + [PAD] * fill)[: seq_length + 1], np.int32),
            "labels": np.array((labels + [IGNORED] * fill)[: seq_length + 1], np.int32),
        }
        supervised += int((record["labels"] != IGNORED).sum())
        writer.write_raw_data([record])
    writer.commit()
    return supervised


def compare(folder: Path, rows: int, seq_length: int, rounds: int) -> None:
    path = folder / "rows.json"
    write_rows(path, rows)
    table = {
        "ours": lambda out: ours(path, out, seq_length, "gigatoken"),
        "ours, packed": lambda out: ours(path, out, seq_length, "gigatoken", packing=True),
        "ours, without the extra `fast`": lambda out: ours(path, out, seq_length, "kitoken"),
        "plain loop over sentencepiece": lambda out: plain(path, out, seq_length),
    }
    spent: dict[str, list[float]] = {name: [] for name in table}
    tokens: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in table.items():
            start = time.process_time()
            tokens[name] = run(folder / "out")
            spent[name].append(time.process_time() - start)
    base = statistics.median(spent["plain loop over sentencepiece"])
    size = path.stat().st_size / rows
    print(
        f"\n{rows:,} rows of {size:.0f} bytes, seq_length {seq_length}, median of {rounds} rounds"
    )
    print("\n| end to end | rows/s of CPU time | against the plain loop |\n|---|---|---|")
    for name, values in spent.items():
        median = statistics.median(values)
        print(f"| {name} | {rows / median:,.0f} | {base / median:.1f}x |")
    print(f"\nsupervised tokens: {', '.join(f'{name} {one:,}' for name, one in tokens.items())}")


def memory_table(folder: Path, rows: int, seq_length: int) -> None:
    """Wall time and peak memory of a process of its own for growing inputs."""
    print("\n| rows | rows/s of wall time | peak memory | of which before reading |")
    print("|---|---|---|---|")
    for count in (rows // 10, rows):
        path = folder / "all.json"
        write_rows(path, count)
        command = [sys.executable, __file__, "--seq_length", str(seq_length), "--measure_memory"]
        done = subprocess.run(
            [*command, str(path), str(folder / "all.mindrecord")],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, before, peak = done.stdout.split()[-3:]
        print(
            f"| {count:,} | {count / float(seconds):,.0f} | {peak} MB | {before} MB |", flush=True
        )


def measure_memory(path: str, output: str, seq_length: int) -> None:
    before = status_bytes("VmHWM")
    start = time.perf_counter()
    ours(Path(path), Path(output), seq_length, "auto")
    seconds = time.perf_counter() - start
    print(seconds, before // 1_000_000, status_bytes("VmHWM") // 1_000_000)


if __name__ == "__main__":
    main()
