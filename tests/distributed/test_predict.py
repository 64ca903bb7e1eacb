"""Prompts answered by several processes, as a user types it."""

import json
import shlex

import pytest
from helpers.answering import make_model
from helpers.distributed import ROOT, start_job

from mixtral_ms.cli.commands.run import main as run
from mixtral_ms.cli.support.exit_status import run_command

PROMPTS = ("I love Beijing, because", "hello", "The import statement is used to")
GREEDY = ("--max_new_tokens", "6", "--set", "generation.logprobs=True")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The YAML of a small network beside its weights."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def arguments(model, tmp_path_factory):
    """What all runs of this file have in common."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"{one}\n" for one in PROMPTS))
    return ["--config", str(model), "--predict_data", str(prompts), *GREEDY]


def answers(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The answers of one process."""
    output = tmp_path_factory.mktemp("alone") / "answers.jsonl"
    assert run_command(run, [*arguments, "--output_file", str(output)]) == 0
    return answers(output)


@pytest.mark.parametrize(
    ("processes", "sizes"),
    [
        (2, {"model_parallel": 2, "expert_parallel": 2}),
        pytest.param(2, {"model_parallel": 2}, marks=pytest.mark.long),
        pytest.param(2, {"data_parallel": 2, "expert_parallel": 2}, marks=pytest.mark.long),
        pytest.param(
            4,
            {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_answers_are_those_of_one_process(arguments, alone, tmp_path, processes, sizes):
    output = tmp_path / "answers.jsonl"
    split = [word for key, n in sizes.items() for word in ("--set", f"parallel_config.{key}={n}")]
    order = [str(ROOT / "run_mindformer.py"), *arguments, "--output_file", str(output)]
    start_job(shlex.join([*order, "--use_parallel", "True", *split]), processes, tmp_path)
    for mine, theirs in zip(answers(output), alone, strict=True):
        assert mine["prompt"] == theirs["prompt"]
        assert mine["token_ids"] == theirs["token_ids"]
        assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=5e-4)
    first, *others = sorted((tmp_path / "logs").glob("worker_*.log"))
    assert PROMPTS[0] in first.read_text()
    assert not any(PROMPTS[0] in one.read_text() for one in others)


def test_stages_are_refused(arguments, capsys):
    sizes = ("--use_parallel", "True", "--set", "parallel_config.pipeline_stage=2")
    assert run_command(run, [*arguments, *sizes]) == 2
    assert "parallel_config.pipeline_stage 2" in capsys.readouterr().err
