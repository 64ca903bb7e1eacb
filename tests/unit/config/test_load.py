"""Reading a run's YAML: positions, types, anchors, overrides, MindFormers' keys."""

import logging
import os
from pathlib import Path

import pytest
import yaml

from mixtral_ms.config import MixtralConfig, RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.config.loading import section_builder
from mixtral_ms.config.sections.training_section import CheckpointMonitorSection, TensorBoardSection
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

ROOT = Path(__file__).parents[3]
MINDFORMERS = ROOT / "tests" / "data" / "mindformers_style.yaml"
SHIPPED = sorted((ROOT / "research").glob("*/*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_text(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def refused(path, *parts, overrides=()):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_all_yaml_files_are_there():
    names = {path.stem for path in SHIPPED}
    assert {"pretrain_mixtral-8x7b_32k", "predict_mixtral-8x7b", "finetune_mixtral-tiny"} <= names
    assert len(names) >= 7


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_yaml_loads_and_agrees_with_itself(path):
    config = load_config(path)
    check_config(config, world_size=None, needs_paths=False)
    assert config.run_mode in path.stem.replace("pretrain", "train")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_yaml_has_its_advice_once(path):
    """Each key carries a comment where it is not the name of a section or a repeated type."""
    bare = [
        line.split("#")[0].strip().removeprefix("- ")
        for line in path.read_text().splitlines()
        if ":" in line.split("#")[0] and "  #" not in line
    ]
    sections = [line for line in bare if line.endswith(":") or "&" in line or "*" in line]
    repeated = {"type", "shuffle", "input_columns"}
    assert {line.split(":")[0] for line in bare if line not in sections} <= repeated


def test_mindformers_yaml_loads_unchanged():
    config = load_config(MINDFORMERS)
    check_config(config, world_size=None, needs_paths=False)
    model = config.model.model_config
    assert (model.hidden_size, model.n_kv_heads, model.theta) == (4096, 8, 1e6)
    assert model.moe_config is config.moe_config
    assert config.moe_config.capacity_factor == 1.1
    assert config.optimizer.moment_decay == (0.9, 0.95)
    assert config.optimizer.learning_rate == 3e-4  # written 3e-4, which PyYAML takes for text
    assert config.parallel_config.expert_parallel == 8  # through an anchor
    assert config.eval_dataset.input_columns == ["input_ids", "labels"]  # through a merge
    assert config.eval_dataset.drop_remainder is False
    assert isinstance(config.callbacks[1], CheckpointMonitorSection)
    assert config.callbacks[1].type == "CheckpointMonitor"  # misspelt in the file
    assert config.train_dataset_task.dataset_config is config.train_dataset


@pytest.fixture
def log_lines():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    yield lines
    get_logger().removeHandler(handler)


def test_keys_without_effect_give_one_log_line_each(log_lines):
    load_config(MINDFORMERS)
    lines = log_lines
    sink = [line for line in lines if "runner_config.sink_size: 2 has no effect" in line]
    assert len(sink) == 1
    assert f"{MINDFORMERS}:" in sink[0]
    assert not any("repeat" in line for line in lines)  # holds its default


def test_what_happens_to_the_last_rows_is_said_when_the_yaml_says_otherwise(write, log_lines):
    load_config(
        write("train_dataset:\n  drop_remainder: False\neval_dataset:\n  drop_remainder: False\n")
    )
    assert [line for line in log_lines if "drop_remainder" in line] == [
        "train_dataset.drop_remainder: False has no effect here: training leaves out the last "
        "partial batch"
    ]


def test_runner_batch_size_wins_as_in_mindformers():
    config = load_config(MINDFORMERS)
    assert config.runner_config.batch_size == config.train_dataset.batch_size == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sead: 1\n", ("run.yaml:1", "'sead'", "'seed'")),
        ("seed: 1\nrunner_config:\n  epoch: 3\n", ("run.yaml:3", "runner_config.epoch", "epochs")),
        ("max_steps: 3\n", ("run.yaml:1", "belongs at 'runner_config.max_steps'")),
        ("context:\n  qqq: 1\n", ("run.yaml:2", "'context.qqq'", "device_target")),
        ("seed: one\n", ("run.yaml:1", "seed", "'one'", "whole number")),
        ("seed: '1'\n", ("seed", "remove the quotes")),
        ("seed: 1.0\n", ("seed", "1.0", "whole number")),
        ("seed: True\n", ("seed", "True", "whole number")),
        ("seed:\n", ("seed", "nothing (null)")),
        ("do_eval: 'True'\n", ("do_eval", "remove the quotes")),
        ("do_eval: 1\n", ("do_eval", "True or False")),
        ("output_dir: 5\n", ("output_dir", "text is needed", "put it in quotes")),
        ("optimizer:\n  eps: .inf\n", ("run.yaml:2", "optimizer.eps", "finite")),
        (f"seed: {'9' * 5000}\n", ("run.yaml:1", "seed")),
        (f"lr_schedule:\n  lr_end: 1{'0' * 500}\n", ("lr_schedule.lr_end",)),
        ("seed: 0x_\n", ("run.yaml:1", "'0x_'")),
        ("optimizer:\n  betas: [0.9, x]\n", ("optimizer.betas.1", "'x'")),
        ("run_mode: trian\n", ("run_mode", "'trian'", "did you mean train?")),
        ("context:\n  deterministic: ON\n", ("context.deterministic", "put it in quotes")),
        ("callbacks:\n  - type: MFLosMonitor\n", ("callbacks.0.type", "MFLossMonitor?")),
        ("callbacks:\n  - prefix: a\n", ("callbacks.0", "`type:`")),
        ("callbacks: {}\n", ("callbacks", "a list of sections")),
        ("runner_config: 3\n", ("runner_config", "a section with the keys epochs")),
        ("runner_wrapper:\n  scale_sense: many\n", ("runner_wrapper.scale_sense", "a number")),
        ("seed: 1\nseed: 2\n", ("run.yaml:2", "duplicate key 'seed'", "run.yaml:1")),
        ("seed: [1\n", ("run.yaml:2", "not valid YAML")),
        ("\tseed: 1\n", ("run.yaml:1", "not valid YAML")),
        ("- seed\n", ("run.yaml", "not a mapping")),
        ("", ("run.yaml", "holds nothing")),
        ("seed: 1\n---\nseed: 2\n", ("run.yaml:2", "not valid YAML")),
        ("seed: !!python/name:os.system ''\n", ("run.yaml:1", "tag")),
        ("seed: !mine 3\n", ("run.yaml:1", "tag")),
        ("[a, b]: 1\n", ("run.yaml:1", "a key must be a word")),
        ("seed: *nowhere\n", ("run.yaml:1", "not valid YAML")),
        ("a: &a\n  b: *a\n", ("run.yaml:1", "contains itself")),
        ("context:\n  <<: 3\n", ("run.yaml:2", "`<<` takes a mapping")),
        ("seed: 010\n", ("seed", "'010'")),
        ("seed: 1:30\n", ("seed", "'1:30'")),
        ("moe_config:\n  shared_expert_num: 2\n", ("moe_config.shared_expert_num", "only 0")),
    ],
)
def test_a_mistake_is_named_with_its_place(write, text, parts):
    message = refused(write(text))
    for part in parts:
        assert any(choice in message for choice in part.split("|")), message


def test_all_mistakes_are_reported_together(write):
    message = refused(write("sead: 1\nrun_mode: go\ncontext:\n  mode: 2\n"), "3 mistakes")
    assert message.count("run.yaml:") == 3 + 1


def test_missing_file_folder_and_binary(tmp_path):
    refused(tmp_path / "none.yaml", "none.yaml", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "b.yaml", "UTF-8")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("".join(f"key{number}: 1\n" for number in range(60_000)), "more than 262144 bytes"),
        (f"seed: {'x' * 10**6}\n", "more than 262144 bytes"),
        ("".join(f"key{number}: 1\n" for number in range(600)), "… and 550 more"),
        (f"seed: {'x' * 10**5}\n", "… (100002 characters) given"),
        (f"run_mode: {'x' * 10**5}\n", "… (100002 characters) given"),
    ],
    ids=range(5),
)
def test_a_flood_is_refused_in_few_words(write, text, part):
    assert len(refused(write(text), "run.yaml", part)) < 30_000


def test_likeness_is_sought_for_what_is_shown_alone(write, monkeypatch):
    asked = []
    monkeypatch.setattr(section_builder, "nearest", lambda word, known: asked.append(word))
    refused(write("".join(f"key{number}: 1\n" for number in range(600))), "… and 550 more")
    assert len(asked) == 50


def test_a_pipe_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"seed: 5\n")
    os.close(writing)
    assert load_config(f"/dev/fd/{reading}").seed == 5
    os.close(reading)


def test_exploding_aliases_are_refused(write):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    refused(write("\n".join(lines)), "aliases expand")


@pytest.mark.parametrize("text", ["1e-5", "1.e-5", "1E-5", "+1e-5", "0.00001", "1.0e-05"])
def test_every_way_to_write_a_float(write, text):
    assert load_config(write(f"optimizer:\n  eps: {text}\n")).optimizer.eps == 1e-5


def test_whole_numbers_serve_as_floats_but_not_the_other_way(write):
    assert load_config(write("lr_schedule:\n  lr_end: 0\n")).lr_schedule.lr_end == 0.0
    refused(write("runner_config:\n  epochs: 2.0\n"), "runner_config.epochs")


def test_moe_config_in_either_place(write):
    inside = write("model:\n  model_config:\n    moe_config:\n      expert_num: 4\n")
    config = load_config(inside)
    assert config.moe_config.expert_num == config.model.model_config.moe_config.expert_num == 4
    both = write(
        "moe_config:\n  expert_num: 8\n"
        "model:\n  model_config:\n    moe_config:\n      expert_num: 4\n"
    )
    refused(both, "model.model_config.moe_config", "differ")


def test_a_task_with_another_data_set_is_refused(write):
    text = (
        "train_dataset:\n  batch_size: 2\ntrain_dataset_task:\n  dataset_config:\n    repeat: 1\n"
    )
    refused(write(text), "train_dataset_task.dataset_config", "differ")
    alone = load_config(write("train_dataset_task:\n  dataset_config:\n    batch_size: 3\n"))
    assert alone.train_dataset.batch_size == 3


def test_top_level_tensorboard_becomes_the_callback(write):
    config = load_config(write("tensorboard:\n  tensorboard_dir: logs\n"))
    assert config.callbacks == [TensorBoardSection(log_dir="logs")]


def test_overrides(write):
    config = load_config(
        MINDFORMERS,
        [
            "seed=7",
            "callbacks.1.save_checkpoint_steps=10",
            "train_dataset.data_loader.dataset_dir=/elsewhere",
            "optimizer.eps=1e-6",
            "parallel_config={data_parallel: 2}",
            "runner_config.max_steps=5",
        ],
    )
    assert config.seed == 7
    assert config.callbacks[1].save_checkpoint_steps == 10
    assert config.train_dataset_task.dataset_config.data_loader.dataset_dir == "/elsewhere"
    assert config.eval_dataset.data_loader.dataset_dir == ""
    assert config.optimizer.eps == 1e-6
    assert config.parallel_config.data_parallel == 2
    assert config.parallel_config.pipeline_stage == 2  # as the file says, which stays
    assert config.runner_config.max_steps == 5
    assert load_config(write("{}"), ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sead=1", ("--set sead=1", "'seed'")),
        ("seed=x", ("--set seed=x", "whole number")),
        ("seed", ("--set 'seed'", "section.key=value")),
        ("=3", ("section.key=value",)),
        ("a..b=3", ("section.key=value",)),
        ("seed.x=3", ("--set seed.x=3", "below a plain value")),
        ("callbacks.9.prefix=x", ("callbacks.9.prefix", "0 to 2")),
        ("callbacks.first.prefix=x", ("'first'", "number of an item")),
        ("seed=[1", ("--set seed=[1", "not valid YAML")),
    ],
)
def test_a_wrong_override_names_its_flag(override, parts):
    refused(MINDFORMERS, *parts, overrides=[override])


def test_two_items_of_a_shared_anchor_are_set_apart(write):
    text = "train_dataset: &d\n  batch_size: 2\neval_dataset: *d\n"
    config = load_config(write(text), ["eval_dataset.batch_size=5"])
    assert (config.train_dataset.batch_size, config.eval_dataset.batch_size) == (2, 5)


def test_network_config_fills_in_what_follows():
    config = MixtralConfig(hidden_size=512, num_heads=8)
    assert (config.n_kv_heads, config.head_dim, config.max_position_embedding) == (8, 64, 2048)
    assert MixtralConfig(hidden_size=4096).intermediate_size == 11008  # LLaMA 7B's width
    with pytest.raises(UserError, match=r"hidden_size 10 .*num_heads 3"):
        MixtralConfig(hidden_size=10, num_heads=3)


@pytest.mark.parametrize("key", ["n_kv_heads", "head_dim", "intermediate_size"])
def test_what_follows_may_be_empty_in_the_yaml_but_not_of_another_type(write, key):
    file = write(f"model:\n  model_config:\n    hidden_size: 4096\n    {key}:\n")
    assert load_config(file).model.model_config == MixtralConfig(hidden_size=4096)
    with pytest.raises(UserError, match=rf"model\.model_config\.{key}: the text 'x' given"):
        load_config(file, [f"model.model_config.{key}=x"])


def test_defaults_need_no_yaml_and_make_independent_sections():
    assert RunConfig() == RunConfig()
    assert RunConfig().context is not RunConfig().context


def test_test_yaml_is_plain_yaml_too():
    assert yaml.safe_load(MINDFORMERS.read_text())["trainer"]["model_name"] == "mixtral-8x7b"
