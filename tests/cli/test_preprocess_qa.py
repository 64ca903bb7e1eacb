"""llama_preprocess.py --dataset_type qa as a user types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from mindspore.dataset import MindDataset

from mixtral_ms.cli.commands.preprocess import main
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "dataset_preprocess" / "llama_preprocess.py"
MODEL = str(find_example_tokenizer())
PIECES = sentencepiece.SentencePieceProcessor(model_file=MODEL)


def conversation(*turns):
    roles = ("human", "gpt")
    turns = [{"from": roles[at % 2], "value": text} for at, text in enumerate(turns)]
    return {"conversations": turns}


ROWS = [
    conversation("What?", "That </s> <unk>."),
    conversation("Empty?", ""),
    conversation("\u4f60\u597d", "\u4e16\u754c \U0001f600", "More?", "ASSISTANT: no"),
    conversation("Long?", "word " * 300),
    conversation("Too long? " + "word " * 300, "yes"),
    conversation("And?", "so", "no answer"),
    {"text": "?"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return tmp_path


def run(folder, *more, output="out.mindrecord", pattern="a.json"):
    flags = {"--dataset_type": "qa", "--input_glob": folder / pattern, "--model_file": MODEL}
    flags |= {"--seq_length": 128, "--template": "mistral"}
    if output:
        flags["--output_file"] = folder / output
    argv = [str(one) for pair in flags.items() for one in pair]
    return run_command(main, [*argv, *more])


def records(path, columns=("input_ids", "labels")):
    data = MindDataset([str(path)], columns_list=list(columns), shuffle=False)
    return list(data.create_tuple_iterator(num_epochs=1, output_numpy=True))


def named(path):
    lines = Path(f"{path}.rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers(labels):
    """Texts of the supervised spans of a record."""
    ids = [int(one) for one in labels if one != -100]
    return PIECES.decode(list(_split(ids)))


def _split(ids):
    part = []
    for one in ids:
        if one == 2:
            yield part
            part = []
        else:
            part.append(one)
    if part:
        yield part


@pytest.mark.slow
def test_the_documented_commands_from_another_folder(folder):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(9)]
    (folder / "alpaca_data.json").write_text(json.dumps(rows))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    converter = TOOL.with_name("alpaca_converter.py")
    for command in (
        [converter, "--data_path", "alpaca_data.json", "--output_path", "c.json"],
        [TOOL, "--dataset_type", "qa", "--input_glob", "c.json", "--model_file", MODEL,
         "--seq_length", "128", "--output_file", "alpaca-fastchat128.mindrecord"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=folder, env=environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "next:" in done.stdout
    got = records(folder / "alpaca-fastchat128.mindrecord")
    assert [answers(labels) for _, labels in got] == [[row["output"]] for row in rows]
    for ids, labels in got:
        assert ids.dtype == labels.dtype == np.int32 and len(ids) == len(labels) == 129
        assert ids[0] == 1 and labels[0] == -100
        assert "A chat between a curious user" in PIECES.decode(ids.tolist())
        kept = labels != -100
        assert (labels[kept] == ids[kept]).all()


def test_every_row_is_written_or_named(folder, capsys):
    assert run(folder) == 0
    got = records(folder / "out.mindrecord")
    listed = named(folder / "out.mindrecord")
    fates = [(one["row"], one["fate"]) for one in listed]
    assert fates == [
        (1, "left out"), (3, "cut"), (4, "left out"), (5, "shortened"), (6, "left out")
    ]  # fmt: skip
    assert len(got) + sum(fate == "left out" for _, fate in fates) == len(ROWS)
    assert "answer 0 is empty" in listed[0]["reason"]
    assert "no answer begins within" in listed[2]["reason"]
    assert "last question" in listed[3]["reason"]
    assert [answers(labels) for _, labels in got] == [
        ["That </s> <unk>."],
        ["\u4e16\u754c \U0001f600", "ASSISTANT: no"],
        [("word " * 300).strip()[: len(answers(got[2][1])[0])]],
        ["so"],
    ]
    assert (got[2][0] != 0).all() and (got[2][1] != -100).sum() > 100
    printed = capsys.readouterr().out
    assert "7 read, 4 taken; 3 left out, 1 cut, 1 shortened" in printed
    assert "row 1 of a.json: left out: answer 0 is empty" in printed


def test_long_rows_are_dropped_or_refused(folder, capsys):
    assert run(folder, "--long_rows", "drop") == 0
    assert len(records(folder / "out.mindrecord")) == 3
    fates = [one["fate"] for one in named(folder / "out.mindrecord")]
    assert fates.count("left out") == 4 and "cut" not in fates
    assert run(folder, "--long_rows", "error", output="other") == 2
    assert "row 3 of" in capsys.readouterr().err
    assert not list(folder.glob("other*")) and not list(folder.glob(".*"))


def test_formats_give_the_same_records(folder):
    rows = [ROWS[0], ROWS[2]]
    as_openai = [
        {
            "messages": [
                {
                    "role": {"human": "user", "gpt": "assistant"}[one["from"]],
                    "content": one["value"],
                }
                for one in row["conversations"]
            ]
        }
        for row in rows
    ]
    (folder / "b.jsonl").write_text("\n".join(json.dumps(one) for one in as_openai))
    (folder / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    expected = None
    for name in ("b.jsonl", "c.json", "d.parquet"):
        assert run(folder, output=f"{name}.mindrecord", pattern=name) == 0
        assert not Path(f"{folder / name}.mindrecord.rows.jsonl").exists()
        got = np.array(records(folder / f"{name}.mindrecord"))
        expected = got if expected is None else expected
        np.testing.assert_array_equal(got, expected)
    assert len(expected) == 2


def test_packing(folder, capsys):
    assert run(folder, "--packing", "--long_rows", "drop") == 0
    ((ids, labels, segments),) = records(
        folder / "out.mindrecord", ("input_ids", "labels", "segment_ids")
    )
    assert segments.max() == 3 and ((segments == 0) == (ids == 0)).all()
    assert (labels[segments == 0] == -100).all()
    assert len(answers(labels)) == 4
    assert "segment_ids" in capsys.readouterr().out


def test_show_prints_and_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    assert run(folder, "--show", "2", output=None) == 0
    printed = capsys.readouterr().out
    assert "[INST] What? [/INST]\u3010 That </s> <unk>.</s>\u3011" in printed
    assert printed.count("sample ") == 2
    assert sorted(folder.iterdir()) == before


def test_output_is_refused_then_overwritten_with_its_list(folder, capsys):
    assert run(folder) == 0
    before = (folder / "out.mindrecord").read_bytes()
    assert run(folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "out.mindrecord").read_bytes() == before
    (folder / "a.json").write_text(json.dumps(ROWS[:1]))
    assert run(folder, "--overwrite") == 0
    assert len(records(folder / "out.mindrecord")) == 1
    assert not (folder / "out.mindrecord.rows.jsonl").exists()


def test_partitions_hold_all_records(folder):
    rows = [conversation(f"{n}?", f"{n}!") for n in range(40)]
    (folder / "a.json").write_text(json.dumps(rows))
    assert run(folder, "--file_partition", "3") == 0
    parts = [one for one in folder.glob("out.mindrecord?") if one.is_file()]
    got = [answers(labels)[0] for part in sorted(parts) for _, labels in records(part)]
    assert sorted(got) == sorted(f"{n}!" for n in range(40))


@pytest.mark.parametrize(
    "more, options, message",
    [
        (("--show", "0"), {}, "--show 0"),
        ((), {"output": None}, "--output_file is needed"),
        (("--repeat", "2"), {}, "--repeat has no effect with --dataset_type qa"),
        (("--add_eos", "False"), {}, "--add_eos has no effect"),
        (("--template", "vicunna"), {}, "did you mean 'vicuna'"),
        (("--template", "chatglm"), {}, "cannot be used"),
        (("--pad_token_id", "2"), {}, "neither bos"),
        (("--seq_length", "0"), {}, "--seq_length 0"),
        (("--file_partition", "0"), {}, "--file_partition 0"),
        (("--dataset_type", "wiki", "--packing"), {}, "--template has no effect|--packing has"),
        ((), {"pattern": "*.none"}, "matches no file"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(folder, capsys, more, options, message):
    before = sorted(folder.iterdir())
    assert run(folder, *more, **options) == 2
    assert re.search(f"^error: .*({message})", capsys.readouterr().err)
    assert sorted(folder.iterdir()) == before


def test_a_file_whose_name_is_no_text(folder, capsys):
    """As on a disk of another system; what is listed and printed is text all the same."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    lines = [ROWS[0], {"bad \ud800": 1}, ROWS[1]]
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    assert run(folder, pattern="caf*.jsonl") == 0
    first, second = named(folder / "out.mindrecord")
    assert first["file"].endswith("caf\\xe9.jsonl") and "ud800" in first["reason"]
    assert second["row"] == 2
    assert r"row 1 of caf\xe9.jsonl: left out" in capsys.readouterr().out
    output = os.fsdecode(b"caf\xe9.mindrecord")
    assert run(folder, pattern="caf*.jsonl", output=output) == 2
    assert "a path that is not UTF-8" in capsys.readouterr().err


def test_no_usable_row_is_an_error_with_the_reasons(folder, capsys):
    (folder / "a.json").write_text(json.dumps([ROWS[1], ROWS[6]]))
    before = sorted(folder.iterdir())
    assert run(folder) == 2
    printed = capsys.readouterr().err
    assert "none of the 2 rows" in printed and "row 1 of a.json: left out: neither" in printed
    assert sorted(folder.iterdir()) == before
