"""The documents' commands are accepted, their links lead somewhere, the two READMEs agree."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.convert_oracle import write_source

from mixtral_ms.cli.commands.convert import main as convert
from mixtral_ms.cli.commands.inspect import main as inspect
from mixtral_ms.cli.commands.preprocess import main as preprocess
from mixtral_ms.cli.commands.run import main as run
from mixtral_ms.cli.commands.transform import main as transform
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TINY = "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
CONFIGS = {
    "TINY": TINY,
    "FINETUNE": "research/mixtral_tiny/finetune_mixtral-tiny.yaml",
    "PREDICT": "research/mixtral_tiny/predict_mixtral-tiny.yaml",
}


def code_spans(path):
    """Inline code and the lines of shell blocks, comments left out."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def commands(path, start):
    return [span for span in code_spans(path) if span.startswith(start)]


def arguments(command):
    """A command's flags, its placeholders filled in; the paths need not exist."""
    filled = re.sub(r"--config (FILE|run\.yaml)", f"--config {TINY}", command)
    for name, path in CONFIGS.items():
        filled = re.sub(rf"\b{name}\b", path, filled)
    return shlex.split(filled)[2:]


RUNS = sorted({c for p in DOCUMENTS for c in commands(p, "python run_mindformer.py --")})
PRETRAIN = next(c for c in RUNS if "--train_data" in c)
OF_OTHER_COMMANDS = ("--text FILE", "--dataset_type ", "--show ")
FLAGS = sorted(
    span
    for span in set(code_spans(ROOT / "README.md"))
    if span.startswith("--") and span != "--set" and not span.startswith(OF_OTHER_COMMANDS)
)


def accept(argv, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        status = run_command(run, argv)
    except SystemExit as ended:  # --help
        status = ended.code
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", RUNS)
def test_run_commands_are_accepted(command, capsys, monkeypatch):
    accept([*arguments(command), "--check_config"], capsys, monkeypatch)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_in_the_text_are_accepted(flags, capsys, monkeypatch):
    accept([*arguments(PRETRAIN), *shlex.split(flags), "--check_config"], capsys, monkeypatch)


def test_weight_commands_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(Path("HF"), "hf", experts=4)
    assert run_command(convert, ["--input_path", "HF", "--output_path", "OUT/checkpoint"]) == 0
    for start, command, skipped in (
        ("python convert_weight.py", convert, 2),
        ("python tools/transform_ckpt.py", transform, 2),
        ("python -m mixtral_ms inspect", inspect, 4),
    ):
        found = commands(ROOT / "README.md", start)
        # adapters need a run first: tests/parity/test_lora_peft.py merges them
        found = [line for line in found if "--merge_lora" not in line]
        assert found
        for line in found:
            status = run_command(command, shlex.split(line)[skipped:])
            assert status == 0, f"{line}: {capsys.readouterr().err}"


def test_preprocess_commands_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name, content in (
        ("text", "a.txt", "Plain text. " * 500),
        ("rows", "a.jsonl", '{"text": "' + "Plain text. " * 500 + '"}\n'),
    ):
        Path(folder).mkdir()
        Path(folder, name).write_text(content)
    Path("tokenizer.model").write_bytes(find_example_tokenizer().read_bytes())
    command = commands(ROOT / "README.md", "python tools/dataset_preprocess/")[0]
    assert run_command(preprocess, arguments(command)) == 0, capsys.readouterr().err
    rows = commands(ROOT / "README.md", "--dataset_type wikipedia")[0]
    more = [*arguments(command), *shlex.split(rows), "--output_file", "rows.mindrecord"]
    assert run_command(preprocess, more) == 0, capsys.readouterr().err
    assert Path("train.mindrecord").is_file()
    assert Path("rows.mindrecord").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_both_readmes_name_the_same_commands():
    english, chinese = (
        {span for span in code_spans(ROOT / name) if " " in span}
        for name in ("README.md", "README_CN.md")
    )
    assert english == chinese
