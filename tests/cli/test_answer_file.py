"""The output file of predict: whole, in order, written before anything is shown, never lost."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from helpers.answering import make_model
from helpers.runs import environment

from mixtral_ms.cli.commands.run import main as run
from mixtral_ms.cli.support.answers import predict_mode
from mixtral_ms.cli.support.answers.answer_file import answer_file, checked_output
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.config import load_config
from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import Generation


def answer(text):
    return Generation(f"prompt of {text}", text, (5, 6), "length", (1,))


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "answers.jsonl"


def files(path):
    return sorted(one.name for one in path.parent.iterdir())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
def test_lines_are_in_the_order_of_the_prompts(output, order):
    with answer_file(output, overwrite=False) as take:
        for index in order:
            take(index, answer(str(index)))
    assert texts(output) == ["0", "1", "2", "3"]
    assert files(output) == ["answers.jsonl"]


def test_an_answer_is_written_when_those_before_it_are_there(output):
    partial = output.with_name("answers.jsonl.partial")
    with answer_file(output, overwrite=False) as take:
        take(1, answer("b"))
        assert texts(partial) == []
        take(0, answer("a"))
        assert texts(partial) == ["a", "b"]
        assert not output.exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("before", [None, "mine"])
def test_a_run_that_ends_early_keeps_answers_and_what_was_there(output, end, before, capsys):
    output.parent.mkdir()
    if before:
        output.write_text(before)
    with pytest.raises(end), answer_file(output, overwrite=True) as take:
        take(0, answer("a"))
        take(3, answer("d"))
        raise end
    partial = output.with_name("answers.jsonl.partial")
    assert texts(partial) == ["a", "d"]
    assert f"ended early: 2 answers are in {partial}" in capsys.readouterr().err
    assert (output.read_text() if output.exists() else None) == before
    output.unlink(missing_ok=True)
    with pytest.raises(UserError, match="partial holds answers of a run that was ended"):
        answer_file(output, overwrite=False).__enter__()
    assert texts(partial) == ["a", "d"]


def test_without_an_answer_nothing_is_left(output):
    with pytest.raises(UserError), answer_file(output, overwrite=False):
        raise UserError("no weights")
    assert not output.parent.exists()


def test_a_killed_run_has_written_what_it_had(output):
    code = """
import os, pathlib, signal, sys
from mixtral_ms.cli.support.answers import predict_mode
from mixtral_ms.cli.support.answers.answer_file import answer_file
from mixtral_ms.infer.engine.sampling_params import Generation
with answer_file(pathlib.Path(sys.argv[1]), overwrite=False) as take:
    for index in range(3):
        take(index, Generation("p", str(index), (), "length"))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, output], env=environment(), timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    partial = output.with_name("answers.jsonl.partial")
    assert texts(partial) == ["0", "1", "2"]
    with answer_file(output, overwrite=True) as take:
        take(0, answer("again"))
    assert (texts(output), files(output)) == (["again"], ["answers.jsonl"])


def test_two_runs_do_not_write_one_file(output):
    with answer_file(output, overwrite=True) as take:
        take(0, answer("first"))
        with pytest.raises(UserError, match="answers.jsonl: choose another, or wait"):
            answer_file(output, overwrite=True).__enter__()
    assert texts(output) == ["first"]


def test_what_came_into_being_meanwhile_is_kept(output):
    with (
        pytest.raises(UserError, match="exists; give --overwrite"),
        answer_file(output, overwrite=False) as take,
    ):
        take(0, answer("ours"))
        output.write_text("theirs")
    assert output.read_text() == "theirs"
    assert texts(output.with_name("answers.jsonl.partial")) == ["ours"]


@pytest.mark.parametrize("target", ["/dev/null", "nowhere"])
def test_an_output_that_is_no_file_is_not_replaced(output, target):
    output.parent.mkdir()
    output.symlink_to(target)
    with pytest.raises(UserError, match="--output_file .*answers.jsonl: a .*link|device"):
        answer_file(output, overwrite=True).__enter__()
    assert os.readlink(output) == target


def test_a_link_in_place_of_the_partial_file_is_not_followed(output):
    output.parent.mkdir()
    mine = output.with_name("mine")
    mine.write_text("mine")
    output.with_name("answers.jsonl.partial").symlink_to(mine)
    with answer_file(output, overwrite=True) as take:
        take(0, answer("a"))
    assert (texts(output), mine.read_text()) == (["a"], "mine")


def test_half_a_character_is_json(output):
    with answer_file(output, overwrite=False) as take:
        take(0, answer("half \ud83d, \u4f60"))
    assert texts(output) == ["half \ud83d, \u4f60"]
    assert "\u4f60" in output.read_text(encoding="utf-8")


def test_a_full_disk_names_the_file_and_leaves_whole_lines(output):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            pytest.raises(OSError, match="partial") as full,
            answer_file(output, overwrite=False) as take,
        ):
            take(0, answer("a"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            for index in range(1, 9):
                take(index, answer(str(index) * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    partial = output.with_name("answers.jsonl.partial")
    assert full.value.filename == str(partial)
    assert texts(partial)[:2] == ["a", "1" * 100]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def inputs_of(model, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n")
    weights = model.parent / "weights"
    return {
        "prompts": tmp_path / "p.txt",
        "YAML": model,
        "weights": weights / "model.safetensors",
        "tokenizer": weights / "tokenizer.model",
        "a link": tmp_path / "link",
    }


@pytest.mark.parametrize("which", ["prompts", "YAML", "weights", "tokenizer", "a link"])
def test_an_input_is_never_replaced(model, tmp_path, capsys, which):
    inputs = inputs_of(model, tmp_path)
    inputs["a link"].symlink_to(tmp_path / "p.txt")
    before = inputs[which].read_bytes()
    status = run_command(run, [
        *("--config", str(model), "--predict_data", str(inputs["prompts"]), "--overwrite"),
        *("--output_file", str(inputs[which])),
    ])  # fmt: skip
    assert status == 2
    assert f"--output_file {inputs[which]}: is read too (--" in capsys.readouterr().err
    assert inputs[which].read_bytes() == before


def test_a_prompt_that_is_no_file_is_no_input(tmp_path):
    prompts = [("--predict_data", text) for text in ("a text", "x" * 5000, "nul \0", "")]
    assert checked_output(str(tmp_path / "a"), overwrite=True, inputs=prompts) == tmp_path / "a"


@pytest.mark.parametrize(
    ("shell", "shown"),
    [
        ("| head -1", re.compile(r"--- 1 of 40 \(length\) ---\n")),
        (">&- 2>&-", re.compile("")),
        ("| PYTHONIOENCODING=ascii cat", re.compile(r".*\\u4f60\\u597d.*", re.S)),
    ],
)
def test_answers_are_written_whoever_looks(model, tmp_path, shell, shown):
    """And half a character spoils its own prompt alone."""
    lines = [json.dumps({"prompt": text}) for text in ["\u4f60\u597d", "\ud83d", *"ab" * 19]]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mixtral_ms run --config {model} --max_new_tokens 3 "
         f"--predict_data p.jsonl --output_file a.jsonl {shell}"],
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert shown.fullmatch(done.stdout.decode()), done.stdout
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["\u4f60\u597d", "\ud83d", *"ab" * 19]
    assert [row["finish_reason"] for row in rows] == ["length", "error", *["length"] * 38]
    assert not os.path.exists(tmp_path / "a.jsonl.partial")


@pytest.mark.parametrize(
    ("environment_", "writes"),
    [
        ({}, True),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "0"}, True),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "1"}, False),
        ({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"}, False),
    ],
)
def test_the_first_rank_writes_for_all(model, tmp_path, monkeypatch, environment_, writes):
    for name, value in environment_.items():
        monkeypatch.setenv(name, value)
    config = load_config(model)
    config.generation.output_file = str(tmp_path / "a.jsonl")
    with predict_mode._output(config, []) as take:
        take(0, answer("a"))
    assert (tmp_path / "a.jsonl").exists() == writes
