"""The run command as a user types it: training, evaluating, looking, mistyping."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.runs import (
    EVAL_ROWS,
    ROOT,
    SEQ_LENGTH,
    environment,
    final_tensors,
    make_run,
    metrics_of,
    run_command,
)
from safetensors.numpy import save_file

from mixtral_ms.cli.commands.run import main
from mixtral_ms.cli.support.exit_status import run_command as guarded
from mixtral_ms.cli.support.run_flags import FLAGS, load_from_args, parse_args
from mixtral_ms.config import load_config
from mixtral_ms.log import get_logger

TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Two steps by MindFormers' launcher name; returns the finished process."""
    return subprocess.run(
        [
            *(sys.executable, ROOT / "run_mindformer.py", "--config", folder / "run.yaml"),
            *("--runner_config.max_steps", "2", "--callbacks.1.enabled", "True"),
            *("--set", "moe_config.capacity_factor=1.0"),
        ],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_training_by_the_launchers_name(trained, folder):
    assert trained.returncode == 0, trained.stderr
    records = metrics_of(folder / "output")
    assert [(r["kind"], r["step"]) for r in records] == [("train", 1), ("train", 2), ("eval", 2)]
    for said in ("step 2/2  loss ", "saved ", "report: ", "eval at step 2: loss "):
        assert said in trained.stderr
    assert (folder / "output" / "report.html").exists()
    assert "Traceback" not in trained.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there(folder):
    done = run_command(
        *("--config", folder / "run.yaml", "--device_target", "Ascend", "--device_id", "999"),
        *("--output_dir", folder / "no_device"),
        cwd=folder,
    )
    assert done.returncode == 2
    assert "context.device_target Ascend, device 999, " in done.stderr
    assert "--device_target CPU" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "no_device").exists()


@pytest.mark.parametrize("batch_size", [3, 7])
def test_eval_prints_what_training_measured(trained, folder, batch_size, capsys, graph):
    # the launcher prints where the checkpoints are, and how to evaluate them
    advice = trained.stderr.split("to evaluate: ")[1].split()
    status = main(
        [
            *("--config", str(folder / "run.yaml"), *advice),
            *("--set", f"eval_dataset.batch_size={batch_size}"),
            *("--set", "moe_config.capacity_factor=1.0"),
        ]
    )
    assert status == 0
    printed = re.fullmatch(
        r"loss (\S+) perplexity (\S+) tokens (\d+)\n", capsys.readouterr().out
    ).groups()
    loss, perplexity, tokens = map(float, printed)
    assert tokens == EVAL_ROWS * SEQ_LENGTH
    assert loss == pytest.approx(metrics_of(folder / "output")[-1]["loss"], rel=1e-5)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.slow
def test_eval_says_what_a_weight_dtype_costs(trained, folder, tmp_path, dtype, capsys, graph):
    def evaluate(weights, *more):
        flags = (
            "--config",
            folder / "run.yaml",
            "--run_mode",
            "eval",
            "--load_checkpoint",
            weights,
        )
        assert main([*map(str, flags), *more]) == 0
        return capsys.readouterr().out.splitlines()

    weights = folder / "output" / "checkpoint"
    (exact,) = evaluate(weights)
    got, said = evaluate(weights, "--weight_dtype", dtype)
    save_file(rounded(folder / "output", dtype), tmp_path / "rounded.safetensors")
    assert [got] == evaluate(tmp_path / "rounded.safetensors")
    before, after = (float(line.split()[3]) for line in (exact, got))
    assert before != after
    change = 100 * (after / before - 1)
    parts = re.fullmatch(r"perplexity (\S+) -> (\S+) \((\S+) %\) with (\w+)", said).groups()
    assert parts[:2] == (f"{before:.4f}", f"{after:.4f}")
    assert float(parts[2]) == pytest.approx(change, abs=1e-3)
    assert parts[3] == dtype


def rounded(output, dtype):
    """The weights of a run's last checkpoint, matrices rounded to a dtype and back."""
    saved = final_tensors(output)
    tensors = {name: saved[name] for name in saved if name.startswith(("model.", "lm_head."))}
    for name, value in tensors.items():
        if value.ndim < 2 or "embedding" in name or "router" in name:
            continue
        if dtype == "float16":
            tensors[name] = value.astype(np.float16).astype(np.float32)
        else:
            scale = np.abs(value).max(-1, keepdims=True) / np.float32(127)
            tensors[name] = np.round(value / scale) * scale
    return tensors


# -- every flag reaches its key ---------------------------------------------------------------

VALUES = {
    "run_mode": ("eval", "eval"),
    "train_dataset_dir": ("a b", "a b"),
    "eval_dataset_dir": ("e", "e"),
    "predict_data": ("one two", ["one", "two"]),
    "predict_batch_size": ("5", 5),
    "vocab_file": ("v", "v"),
    "do_sample": ("False", False),
    "max_new_tokens": ("13", 13),
    "temperature": ("0.5", 0.5),
    "top_k": ("9", 9),
    "top_p": ("0.75", 0.75),
    "min_p": ("0.25", 0.25),
    "repetition_penalty": ("1.5", 1.5),
    "presence_penalty": ("-0.5", -0.5),
    "stop": ("end", ["end"]),
    "num_beams": ("3", 3),
    "weight_dtype": ("int8", "int8"),
    "logprobs": ("True", True),
    "output_file": ("o.jsonl", "o.jsonl"),
    "overwrite": ("True", True),
    "load_checkpoint": ("c", "c"),
    "allow_partial": ("True", True),
    "load_ckpt_format": ("ckpt", "ckpt"),
    "resume_training": ("True", True),
    "auto_trans_ckpt": ("True", True),
    "no_shared_storage": ("True", True),
    "src_strategy_path_or_dir": ("s", "s"),
    "strategy_load_checkpoint": ("t", "t"),
    "transform_process_num": ("3", 3),
    "only_save_strategy": ("true", True),
    "remove_redundancy": ("True", True),
    "output_dir": ("o", "o"),
    "seed": ("11", 11),
    "use_parallel": ("TRUE", True),
    "do_eval": ("True", True),
    "epochs": ("9", 9),
    "batch_size": ("16", 16),
    "gradient_accumulation_steps": ("6", 6),
    "sink_mode": ("True", True),
    "num_samples": ("77", 77),
    "mode": ("1", 1),
    "device_target": ("Ascend", "Ascend"),
    "device_id": ("2", 2),
    "profile": ("True", True),
    "register_path": ("r", "r"),
    "modal_type": ("text image", ["text", "image"]),
    "remote_save_url": ("u", "u"),
    "adapter_id": ("x y", ["x", "y"]),
}
"""What is typed after each flag, and what its key must then hold."""


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.names[0])
def test_every_flag_sets_its_keys_and_nothing_else(flag):
    typed, wanted = VALUES[flag.names[0].removeprefix("--")]
    default = load_config(TINY)
    for name in flag.names:
        given = typed.split() if flag.many else [typed]
        config = load_from_args(parse_args(["--config", str(TINY), name, *given]))
        for key in flag.keys:
            assert value_of(default, key) != wanted, "the test must choose another value"
            assert value_of(config, key) == wanted
        others = {key for flags in FLAGS for key in flags.keys} - set(flag.keys)
        if flag.names[0] == "--batch_size":
            others -= {"train_dataset.batch_size"}
        assert [k for k in others if value_of(config, k) != value_of(default, k)] == []


@pytest.mark.parametrize(
    "flag",
    [f for f in FLAGS if "without effect" in f.help or "no effect" in f.help],
    ids=lambda flag: flag.names[0],
)
def test_a_flag_without_effect_says_so(flag, monkeypatch):
    lines = []
    monkeypatch.setattr(get_logger(), "handle", lambda record: lines.append(record.getMessage()))
    typed = VALUES[flag.names[0].removeprefix("--")][0].split()
    load_from_args(parse_args(["--config", str(TINY), flag.names[0], *typed]))
    notes = [line for line in lines if flag.keys[0] in line]
    assert len(notes) == 1
    assert "no effect" in notes[0]


# -- looking without running ------------------------------------------------------------------

LOOK = """
import sys
from mixtral_ms.cli.support.exit_status import run_command as guarded
from mixtral_ms.cli.commands.run import main
status = main(sys.argv[1:])
heavy = {"mindspore", "torch", "transformers", "matplotlib"} & set(sys.modules)
print("heavy modules:", sorted(heavy), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("flag", "part"),
    [("--check_config", "memory of each rank"), ("--print_config", "seq_length: 256")],
)
def test_looking_needs_no_mindspore_and_writes_nothing(flag, part, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", LOOK, "--config", TINY, flag],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert part in shown.stdout
    assert "heavy modules: []" in shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_printed_configuration_can_be_run_again(tmp_path, capsys):
    main(["--config", str(TINY), "--seed", "5", "--print_config"])
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    again = load_config(tmp_path / "again.yaml")
    assert again.seed == 5
    assert again.model == load_config(TINY).model


# -- wrong input ------------------------------------------------------------------------------


@pytest.fixture
def wrong(folder, monkeypatch, capsys):
    """Gives what a wrong command prints to stderr, line by line; it must leave with 2."""
    monkeypatch.chdir(folder)

    def run(arguments):
        try:
            status = guarded(main, [str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            status = leaving.code
        printed = capsys.readouterr()
        assert (status, printed.out) == (2, "")
        return [line for line in printed.err.splitlines() if " INFO " not in line]

    return run


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config", TINY], "set --train_data"),
        (["--config", TINY, "--train_data", "nowhere"], "path does not exist: nowhere"),
        (["--config", TINY, "--train_data", "run.yaml"], "run.yaml: not a MindRecord"),
        (["--config", "run.yaml", "--set", "sead=1"], "did you mean 'seed'"),
        (["--config", "run.yaml", "--run_mode", "predict"], "set --predict_data"),
        (["--config", "run.yaml", "--run_mode", "eval"], "set --load_checkpoint"),
        (["--config", "run.yaml", "--load_checkpoint", "gone"], "path does not exist: gone"),
        (
            ["--config", "run.yaml", "--resume_training", "x-step_0000001"],
            "no checkpoint 'x-step_0000001'",
        ),
        (
            ["--config", "run.yaml", "--batch_size", "100", "--output_dir", "o"],
            "fewer than one batch of 100",
        ),
        (["--config", "run.yaml", "--output_dir", "run.yaml"], "is a file, not a folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(wrong, trained, arguments, part):
    lines = wrong(arguments)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "the following arguments are required: --config"),
        (["--config", TINY, "--epoch", "1"], "did you mean --epochs?"),
        (["--config", TINY, "--do_eval", "yes"], "'yes' given: write True or False"),
    ],
)
def test_wrong_flags_show_the_usage_and_one_error(wrong, arguments, part):
    lines = wrong(arguments)
    assert lines[0].startswith("usage: ")
    assert part in lines[-1]
    assert sum("error: " in line for line in lines) == 1


@pytest.mark.parametrize("more", [[], ["--debug"]])
@pytest.mark.slow
def test_only_debug_shows_the_traceback(folder, more):
    arguments = ["--config", "run.yaml", "--train_data", "nowhere", *more]
    ended = run_command(*arguments, cwd=folder, timeout=60)
    assert ended.returncode == 2
    assert ("Traceback" in ended.stderr) == bool(more)
    assert "nowhere" in ended.stderr.splitlines()[-1]


def test_metrics_are_plain_json(trained, folder):
    for line in (folder / "output" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
