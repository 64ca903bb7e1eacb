"""Flags of the run command, and what --check_config prints."""

from pathlib import Path

import pytest

from mixtral_ms.cli.support.check_config_report import describe
from mixtral_ms.cli.support.run_flags import FLAGS, build_parser, load_from_args, parse_args
from mixtral_ms.config import load_config
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml")
PREDICT = str(ROOT / "research/mixtral_tiny/predict_mixtral-tiny.yaml")
BIG = str(ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml")

# the launcher's flags as MindFormers' users type them
UPSTREAM = [
    "config",
    "mode",
    "device_id",
    "device_target",
    "run_mode",
    "do_eval",
    "train_dataset_dir",
    "train_data",
    "eval_dataset_dir",
    "predict_data",
    "modal_type",
    "predict_batch_size",
    "adapter_id",
    "load_checkpoint",
    "src_strategy_path_or_dir",
    "auto_trans_ckpt",
    "transform_process_num",
    "only_save_strategy",
    "resume_training",
    "strategy_load_checkpoint",
    "remote_save_url",
    "seed",
    "use_parallel",
    "profile",
    "options",
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "sink_mode",
    "num_samples",
    "output_dir",
    "register_path",
]


def load(*arguments, path=TINY):
    return load_from_args(parse_args(["--config", path, *arguments]))


def test_every_upstream_flag_is_known():
    known = {name for action in build_parser()._actions for name in action.option_strings}
    assert {f"--{name}" for name in UPSTREAM} <= known


def test_flags_set_their_keys():
    typed = (
        "--run_mode finetune --train_data /d --eval_dataset_dir /e --load_checkpoint /c "
        "--use_parallel False --do_eval True --seed 7 --epochs 3 --batch_size 2 "
        "--gradient_accumulation_steps 4 --sink_mode true --num_samples 9 "
        "--output_dir /o --device_target Ascend --auto_trans_ckpt True --mode 1"
    )
    config = load(*typed.split())
    assert config.run_mode == "finetune"
    assert config.train_dataset.data_loader.dataset_dir == "/d"
    assert config.eval_dataset.data_loader.dataset_dir == "/e"
    assert config.load_checkpoint == "/c"
    assert (config.use_parallel, config.do_eval, config.seed) == (False, True, 7)
    runner = config.runner_config
    assert (runner.epochs, runner.batch_size, runner.gradient_accumulation_steps) == (3, 2, 4)
    assert runner.sink_mode is True
    assert config.train_dataset.data_loader.num_samples == 9
    assert config.eval_dataset.data_loader.num_samples == 9
    assert (config.output_dir, config.auto_trans_ckpt) == ("/o", True)
    assert (config.context.device_target, config.context.mode) == ("Ascend", 1)


def test_num_samples_does_not_invent_data_sets():
    config = load("--num_samples", "9", path=PREDICT)
    assert config.train_dataset is None
    assert config.eval_dataset is None


@pytest.mark.parametrize(
    ("given", "wanted"), [("True", True), ("false", False), ("step-40", "step-40")]
)
def test_resume_training_takes_a_switch_or_a_name(given, wanted):
    assert load("--resume_training", given).resume_training == wanted


def test_values_of_named_flags_are_taken_as_typed():
    config = load("--load_checkpoint", "a: b", "--predict_data", "1", "yes: no")
    assert config.load_checkpoint == "a: b"
    assert config.predict_data == ["1", "yes: no"]


def test_any_key_in_four_spellings():
    config = load(
        *("--set", "seed=1", "--set", "lr_schedule.lr_end=1e-6"),
        *("--options", "optimizer.eps=1e-7", "runner_config.max_steps=5"),
        *("--callbacks.1.save_checkpoint_steps", "11", "--runner_config.stop_at_step=4"),
    )
    assert (config.seed, config.lr_schedule.lr_end, config.optimizer.eps) == (1, 1e-6, 1e-7)
    assert (config.runner_config.max_steps, config.runner_config.stop_at_step) == (5, 4)
    assert config.callbacks[1].save_checkpoint_steps == 11


def test_set_wins_over_a_named_flag():
    assert load("--seed", "1", "--set", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device_target", "GPU"], "--device_target GPU: context.device_target"),
        (["--mode", "3"], "--mode 3: context.mode"),
        (["--set", "sed=1"], "--set sed=1: unknown key 'sed'"),
        (["--options", "seed=x"], "--options seed=x: seed"),
        (["--runner_config.epoch", "3"], "--set runner_config.epoch=3: unknown key"),
        (["--runner_config.epochs"], "--runner_config.epochs: give it a value"),
    ],
)
def test_a_wrong_value_names_its_flag(arguments, part):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--do_eval", "yes"], "write True or False"),
        (["--run_mode", "trian"], "invalid choice: 'trian'"),
        (["stray"], "unrecognized argument: stray"),
    ],
)
def test_a_wrong_flag_leaves_with_status_two(arguments, part, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--config", TINY, *arguments])
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_help_explains_every_flag_and_shows_an_example():
    text = build_parser("run_mindformer.py").format_help()
    assert "run_mindformer.py --config research/mixtral_tiny/pretrain_mixtral-tiny.yaml" in text
    assert all(flag.help for flag in FLAGS)


def test_describe_shows_what_would_run():
    text = describe(load_config(BIG))
    assert "parameters: 46,702,792,704, of which a token meets 12,879,925,248" in text
    assert "ranks: 16" in text
    assert "one step: 128 sequences, 524,288 tokens" in text
    assert "hidden_size: 4096" in text
    assert "set --train_data" in text
    assert "mixtral_ms check-graphs" in text
    assert "check-graphs" not in describe(load_config(TINY)), "there is no Ascend in it"


def test_describe_says_what_prediction_lacks(tmp_path):
    def lacking(*settings):
        text = describe(load_config(PREDICT, [f"output_dir={tmp_path}/run", *settings]))
        return text.partition("before this runs:\n")[2].splitlines()

    weights = f"load_checkpoint={tmp_path / 'm.ckpt'}"
    assert ["needs weights" in one for one in lacking()] == [True]
    assert ["load_checkpoint: path does not exist" in one for one in lacking(weights)] == [True]
    (tmp_path / "m.ckpt").touch()
    assert ["no tokenizer.model beside the weights" in one for one in lacking(weights)] == [True]
    (tmp_path / "tokenizer.model").touch()
    assert lacking(weights) == []


def test_describe_warns_of_too_little_memory():
    config = load_config(BIG, ["context.max_device_memory=20GB"])
    assert "stage 1 needs" in describe(config)
    assert "context.max_device_memory is 20GB" in describe(config)
    assert "needs" not in describe(load_config(TINY)).split("memory of each rank")[1]
