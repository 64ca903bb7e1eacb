"""alpaca_converter.py against the shape in MindFormers' document, and its refusals."""

import json

import pytest

from mixtral_ms.cli.commands.alpaca import main
from mixtral_ms.cli.support.exit_status import run_command

ROWS = [
    {"instruction": "Give three tips.", "input": "", "output": "1.Eat.\n2. Sleep \u4f60\u597d."},
    {"instruction": "Identify the odd one.", "input": "Twitter, {x}", "output": "Telegram"},
]
HEAD = "Below is an instruction that describes a task"
REQUEST = " Write a response that appropriately completes the request.\n\n### Instruction:\n"
EXPECTED = [
    {
        "id": "1",
        "conversations": [
            {
                "from": "human",
                "value": f"{HEAD}.{REQUEST}Give three tips.\n\n### Response:",
            },
            {"from": "gpt", "value": ROWS[0]["output"]},
        ],
    },
    {
        "id": "2",
        "conversations": [
            {
                "from": "human",
                "value": f"{HEAD}, paired with an input that provides further context.{REQUEST}"
                "Identify the odd one.\n\n### Input:\nTwitter, {x}\n\n### Response:",
            },
            {"from": "gpt", "value": "Telegram"},
        ],
    },
]


def convert(folder, rows, *more, name="in.json", lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (folder / name).write_text(text)
    argv = ["--data_path", str(folder / name), "--output_path", str(folder / "out.json"), *more]
    return run_command(main, argv)


@pytest.mark.parametrize("lines", [False, True])
def test_shape_and_bytes_are_the_documents(tmp_path, lines):
    name = "in.jsonl" if lines else "in.json"
    assert convert(tmp_path, ROWS, name=name, lines=lines) == 0
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert text == json.dumps(EXPECTED, ensure_ascii=False, indent=2)


def test_an_output_is_not_overwritten_unless_asked(tmp_path, capsys):
    (tmp_path / "out.json").write_text("mine")
    assert convert(tmp_path, ROWS) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "mine"
    assert convert(tmp_path, ROWS, "--overwrite") == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == EXPECTED


def test_bad_rows_are_all_named_or_left_out(tmp_path, capsys):
    bad = [{"instruction": "", "output": "x"}, ROWS[0], {"instruction": "x"}, 5, ROWS[1]]
    assert convert(tmp_path, bad) == 2
    printed = capsys.readouterr().err
    for line in ("row 0: no instruction", "row 2: no output", "row 3: a int"):
        assert line in printed
    assert "3 rows" in printed and "--skip_bad_rows" in printed
    assert not (tmp_path / "out.json").exists()
    assert convert(tmp_path, bad, "--skip_bad_rows") == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == EXPECTED
    printed = capsys.readouterr().out
    assert "5 read, 3 left out" in printed and "left out:  row 2: no output" in printed


@pytest.mark.parametrize(
    "rows, more, message",
    [([], (), "no usable row"), ([3], ("--skip_bad_rows",), "no usable row")],
)
def test_nothing_to_write_is_an_error(tmp_path, capsys, rows, more, message):
    assert convert(tmp_path, rows, *more) == 2
    assert message in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["in.json"]


def test_an_absent_file_is_named(tmp_path, capsys):
    argv = ["--data_path", str(tmp_path / "none.json"), "--output_path", str(tmp_path / "o.json")]
    assert run_command(main, argv) == 2
    assert "none.json: no such file" in capsys.readouterr().err
