"""Keys that could mislead: each acts, is refused by name, or is one line of the log."""

import re
from pathlib import Path

import pytest

from mixtral_ms.config import load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[3]
TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
PREDICT = ROOT / "research/mixtral_tiny/predict_mixtral-tiny.yaml"
MINDFORMERS = ROOT / "tests/data/mindformers_style.yaml"
TASK = "train_dataset_task.dataset_config."
EVAL_TASK = "eval_dataset_task.dataset_config."
MOE = "model.model_config.moe_config."


def value_of(config, path):
    for key in path.split("."):
        config = config[int(key)] if key.isdecimal() else getattr(config, key)
    return config


ACTING = [
    # an override by whatever name, and where its value is read
    (TASK + "data_loader.shuffle=False", "train_dataset.data_loader.shuffle", False),
    (TASK + "data_loader.dataset_dir=/x", "train_dataset.data_loader.dataset_dir", "/x"),
    (TASK + "data_loader={dataset_dir: /x}", "train_dataset.data_loader.dataset_dir", "/x"),
    (TASK + "input_columns=[input_ids, labels]", "train_dataset.input_columns.1", "labels"),
    (EVAL_TASK + "batch_size=3", "eval_dataset.batch_size", 3),
    ("eval_dataset_task={dataset_config: {batch_size: 3}}", "eval_dataset.batch_size", "refused"),
    (EVAL_TASK + "data_loader.num_samples=4", "eval_dataset.data_loader.num_samples", 4),
    ("train_dataset_task.dataset_config=null", "train_dataset", None),
    ("train_dataset=null", "train_dataset", None),
    (MOE + "expert_num=4", "moe_config.expert_num", 4),
    ("moe_config.expert_num=4", MOE + "expert_num", 4),
    ("callbacks.CheckpointMonitor.keep_checkpoint_max=2", "callbacks.1.keep_checkpoint_max", 2),
    # a section over a section leaves the rest of it as it was
    ("lr_schedule={warmup_ratio: 0.1}", "lr_schedule.learning_rate", 1e-3),
    ("model={model_config: {theta: 5.0}}", "model.model_config.hidden_size", 256),
    ("callbacks.1={keep_checkpoint_max: 2}", "callbacks.1.save_checkpoint_steps", 50),
    ("callbacks.1={type: SampleMonitor}", "callbacks.1.rows", 3),
    ("moe_config={aux_loss_factor: 0.5}", "moe_config.num_experts_chosen", 2),
]


@pytest.mark.parametrize(("override", "path", "value"), ACTING)
def test_an_override_acts_by_each_of_its_names(override, path, value):
    if value == "refused":
        with pytest.raises(UserError, match=r"--set eval_dataset_task=.*eval_dataset \(.*differ"):
            load_config(TINY, [override])
        return
    config = load_config(TINY, [override])
    assert value_of(config, path) == value
    for one in ("train_dataset", "eval_dataset"):  # both names are of one section
        assert getattr(config, f"{one}_task").dataset_config is getattr(config, one)
    assert config.model.model_config.moe_config is config.moe_config


@pytest.mark.parametrize("path", [TINY, MINDFORMERS], ids=["ours", "MindFormers"])
@pytest.mark.parametrize("key", ["train_dataset.", TASK])
def test_flags_and_both_names_follow_one_another(path, key):
    flag = "train_dataset.data_loader.dataset_dir=/flag"
    config = load_config(path, [flag, key + "data_loader.dataset_dir=/x"])
    assert config.train_dataset.data_loader.dataset_dir == "/x"


def test_a_section_that_the_yaml_has_by_its_second_name_alone_is_set_by_both(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "train_dataset_task:\n  dataset_config:\n    data_loader: {dataset_dir: /a}\n"
        "model:\n  model_config:\n    moe_config: {expert_num: 4, aux_loss_factor: 0.5}\n"
    )
    config = load_config(file, ["train_dataset.data_loader.dataset_dir=/b", MOE + "expert_num=2"])
    assert config.train_dataset.data_loader.dataset_dir == "/b"
    assert (config.moe_config.expert_num, config.moe_config.aux_loss_factor) == (2, 0.5)


HINTS = [
    # a wrong key, and what its error must name
    (TASK + "data_loader.shufle=False", "'train_dataset.data_loader.shufle': did you mean 'shuff"),
    (EVAL_TASK + "batchsize=3", "did you mean 'batch_size'"),
    ("train_dataset_task.data_loader.shuffle=False", "it belongs at 'train_dataset.data_loader'"),
    ("data_loader.shuffle=False", "known keys there|unknown key 'data_loader'"),
    ("train_dataset.batchsize=3", "'batch_size'? runner_config.batch_size wins over it"),
    ("optimizer.learning_rat=3", "'learning_rate'? lr_schedule.learning_rate wins over it"),
    ("runner_config.sink_siz=3", "'sink_size'? It has no effect here: a step is one"),
    ("model.model_config.pipeline_stages=2", "no effect here: parallel_config.pipeline_stage says"),
    ("batch_size=3", "it belongs at 'runner_config.batch_size'"),
    ("learning_rate=0.1", "it belongs at 'lr_schedule.learning_rate'"),
    ("num_samples=3", "it belongs at 'train_dataset.data_loader.num_samples'"),
    ("save_checkpoint_steps=3", "it belongs at 'callbacks.CheckpointMonitor.save_checkpoint_st"),
    ("callbacks.0.save_checkpoint_steps=3", "'callbacks.CheckpointMonitor.save_checkpoint_st"),
    ("expert_num=3", "it belongs at 'moe_config.expert_num'"),
    ("model.model_config.expert_num=3", "it belongs at 'moe_config.expert_num'"),
    ("runner_config.learning_rate=3", "it belongs at 'lr_schedule.learning_rate'"),
    ("eos_token_id=3", "it belongs at 'model.model_config.eos_token_id'"),
    ("max_length=3", "unknown key 'max_length'"),
    ("callbacks.Checkpoint.prefix=a", "0 to 1, or its type: MFLossMonitor, CheckpointMonitor"),
    # what was meant by a value
    ("seed=010", "without 0 at its front, 10"),
    ("runner_config.epochs=007", "without 0 at its front, 7"),
    ("seed='10'", "remove the quotes"),
    ("load_checkpoint=None", "what is empty is null in YAML"),
    ("model.model_config.sliding_window=None", "what is empty is null in YAML"),
    ("metric=[{type: PerplexityMetric}]", "one, without the dash before it"),
    ("runner_config=[{epochs: 3}]", "one, without the dash before it"),
]


@pytest.mark.parametrize(("override", "said"), HINTS)
def test_a_hint_names_the_key_that_acts(override, said):
    with pytest.raises(UserError) as caught:
        load_config(TINY, [override])
    message = str(caught.value)
    assert any(part in message for part in said.split("|")), message
    assert f"--set {override}" in message
    if named := re.search(r"it belongs at '([^']+)'", message):
        kept = named[1].replace("CheckpointMonitor.", "1.")
        assert "task" not in kept
        value_of(load_config(TINY, ["eval_dataset.batch_size=1"]), kept)


REMARKS = [
    (["model.model_config.pad_token_id=2"], "pad_token_id 2 is eos_token_id too"),
    (["model.model_config.pad_token_id=1"], "pad_token_id 1 is bos_token_id too"),
    (
        ["model.model_config.pad_token_id=7", "model.model_config.eos_token_id=[2, 7]"],
        "pad_token_id 7 is eos_token_id too",
    ),
    (["model.model_config.compute_dtype=float16"], "float16 without runner_wrapper.scale_sense"),
    (["optimizer.learning_rate=0.5"], "optimizer.learning_rate 0.5 gives way to lr_schedule."),
    (["runner_config.max_steps=5", "runner_config.epochs=3"], "epochs 3 gives way to max_steps 5"),
    (["model.model_config.batch_size=5"], "model_config.batch_size 5 gives way to runner_config."),
    (["train_dataset.batch_size=5"], "train_dataset.batch_size 5 gives way to runner_config."),
    (["lr_schedule.warmup_steps=0"], "lr_schedule.warmup_steps 0 gives way to warmup_ratio 0.05"),
    (["runner_config.global_batch_size=32"], "gradient_accumulation_steps is 4, as global_batch"),
    (
        ["load_checkpoint=/a", "model.model_config.checkpoint_name_or_path=/b"],
        "checkpoint_name_or_path /b gives way to load_checkpoint /a",
    ),
    (["parallel_config.model_parallel=2"], "use_parallel is False: parallel_config's model_par"),
]


@pytest.mark.parametrize(("overrides", "said"), REMARKS)
def test_what_is_seldom_meant_is_one_line(overrides, said, capsys):
    config = load_config(TINY, overrides)
    check_config(config, needs_paths=False)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if said in line]) == 1, lines


SILENT = [
    (TINY, []),
    (TINY, ["model.model_config.pad_token_id=-1"]),
    (TINY, ["model.model_config.pad_token_id=-1", "model.model_config.eos_token_id=-1"]),
    (TINY, ["model.model_config.compute_dtype=float16", "runner_wrapper.scale_sense=1024.0"]),
    (TINY, ["model.model_config.compute_dtype=bfloat16"]),
    (TINY, ["optimizer.learning_rate=0.001"]),
    (TINY, ["lr_schedule=null", "optimizer.learning_rate=0.5"]),
    (TINY, ["runner_config.max_steps=5", "runner_config.epochs=1"]),
    (PREDICT, []),
    (PREDICT, ["model.model_config.pad_token_id=2", "model.model_config.compute_dtype=float16"]),
]


@pytest.mark.parametrize(("path", "overrides"), SILENT)
def test_what_is_meant_needs_no_line(path, overrides, capsys):
    check_config(load_config(path, overrides), needs_paths=False)
    assert capsys.readouterr().err == ""


HOMES = [
    "output_dir",
    "load_checkpoint",
    "adapter",
    "src_strategy_path_or_dir",
    "train_dataset.data_loader.dataset_dir",
    TASK + "data_loader.dataset_dir",
    "eval_dataset.data_loader.dataset_dir",
    "processor.tokenizer.vocab_file",
    "context.save_graphs_path",
    "callbacks.1.directory",
]


@pytest.mark.parametrize("key", HOMES)
def test_a_home_is_written_out_wherever_a_path_is(key, monkeypatch):
    monkeypatch.setenv("HOME", "/the/home")
    path = key.replace(TASK, "train_dataset.")
    assert value_of(load_config(TINY, [f"{key}=~/x y"]), path) == "/the/home/x y"
    assert value_of(load_config(TINY, [f"{key}=./~/x"]), path) == "./~/x"
    for text in ("$HOME/x", "${HOME}/x"):
        with pytest.raises(UserError, match=r"HOME.*/x: variables are a shell's"):
            load_config(TINY, [f"{key}={text}"])
    with pytest.raises(UserError, match=r"~no.such.user/x: there is no such home folder"):
        load_config(TINY, [f"{key}=~no.such.user/x"])


def test_callbacks_with_paths_of_their_own(monkeypatch):
    monkeypatch.setenv("HOME", "/the/home")
    config = load_config(
        TINY,
        [
            "callbacks=[{type: MetricsWriter, path: ~/m.jsonl}, {type: TensorBoard, log_dir: ~/t}]",
            "tensorboard=null",
        ],
    )
    assert (config.callbacks[0].path, config.callbacks[1].log_dir) == (
        "/the/home/m.jsonl",
        "/the/home/t",
    )
