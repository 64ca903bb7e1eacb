"""Contradictions between keys: each is found, with its keys and both numbers."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_ms.cli.support.check_config_report import describe
from mixtral_ms.config import load_config
from mixtral_ms.config.checks.check_config import check_config, find_contradictions
from mixtral_ms.config.loading.resolve import rank_count, sequences_per_micro_step
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[3]
TINY = ROOT / "research/mixtral_tiny/pretrain_mixtral-tiny.yaml"
BIG = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"


def problems(path, *overrides):
    return "\n".join(find_contradictions(load_config(path, overrides)))


PET = "model.model_config.pet_config={{lora_rank: 4, target_modules: {}}}"


@pytest.mark.parametrize(
    ("pattern", "unused"),
    [
        (".*wq|.*lm_head", ".*lm_head"),
        (".*lm_head|.*wq", ".*lm_head"),
        (".*(wq|lm_head)", "lm_head"),
        (".*(?:q_proj|wv|w1)", "q_proj"),
        (".*w[qkvo]|.*gate_proj|.*w1", ".*gate_proj"),
        (r".*layers\.(0|99)\..*wq", "99"),
        (".*wq|", ""),
        (".*wq|.*wq", None),
        (".*w[qkvo]|.*w[123]", None),
        (".*|.*router.*", None),
        (".*wq|.*w[|]", ".*w[|]"),
        (r".*[]|q]|.*\|", r".*\|"),
        (r".*(?P<kind>wq|(w|x)1)", "x"),
        (".*(?=w)(wq|w(k|v))", None),
        (r"(.*)wq|.*wk", None),
    ],
)
def test_each_branch_of_target_modules_means_a_module(pattern, unused):
    found = problems(TINY, PET.format(json.dumps(pattern)))
    assert ("means no module" in found) == (unused is not None)
    assert unused is None or f"{unused!r} in model_config.pet_config.target_modules" in found


def test_pefts_list_of_target_modules_is_answered_with_our_names():
    with pytest.raises(
        UserError, match=r"a list of 2 given; text .*'\.\*wq\|\.\*wv', in place of PEFT's"
    ):
        load_config(TINY, [PET.format("[q_proj, v_proj]")])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.model_config.n_kv_heads=3"], ("num_heads 8", "n_kv_heads 3")),
        (["model.model_config.head_dim=7"], ("head_dim 7", "must be even")),
        (["moe_config.num_experts_chosen=9"], ("num_experts_chosen 9", "expert_num 8")),
        (["model.model_config.num_layers=99999999999"], ("num_layers is 99999999999", "10000")),
        (["moe_config.expert_num=99999999999"], ("expert_num is 99999999999", "10000")),
        (["moe_config.capacity_factor=1000"], ("capacity_factor 1000",)),
        (["model.model_config.eos_token_id=32000"], ("eos_token_id 32000", "31999")),
        (["model.model_config.bos_token_id=-2"], ("bos_token_id -2",)),
        (["model.model_config.ignore_token_id=5"], ("ignore_token_id 5", "32000")),
        (["model.model_config.max_position_embedding=128"], ("seq_length 256", "128")),
        (["model.model_config.sliding_window=0"], ("sliding_window is 0",)),
        (["model.model_config.rms_norm_eps=0"], ("rms_norm_eps is 0.0", "more than 0")),
        (["model.model_config.theta=-1"], ("theta is -1.0",)),
        (["model.model_config.top_p=1.5"], ("top_p is 1.5", "at most 1")),
        (["moe_config.router_jitter=1"], ("router_jitter is 1.0", "less than 1")),
        (["optimizer.betas=[0.9, 1.0]"], ("optimizer.betas.1 is 1.0",)),
        (["optimizer.betas=[0.9]"], ("optimizer.betas has 1",)),
        (["optimizer.beta1=0.8"], ("optimizer.beta1 0.8", "[0.9, 0.95]")),
        (["lr_schedule.warmup_steps=10"], ("warmup_ratio 0.05", "warmup_steps 10")),
        (
            ["lr_schedule.warmup_ratio=null", "lr_schedule.warmup_steps=10"]
            + ["runner_config.max_steps=5"],
            ("warmup_steps 10", "max_steps 5"),
        ),
        (["lr_schedule.warmup_ratio=1"], ("warmup_ratio is 1.0", "less than 1")),
        (["lr_schedule.total_steps=0"], ("total_steps is 0",)),
        (["lr_schedule.lr_end=1"], ("lr_end 1.0", "learning_rate 0.001")),
        (["lr_schedule=null"], ("lr_schedule.learning_rate", "optimizer.learning_rate")),
        (["runner_wrapper.scale_sense=0"], ("scale_sense is 0.0",)),
        (
            ["runner_wrapper.scale_sense={loss_scale_value: 2, min_loss_scale: 4}"],
            ("loss_scale_value 2.0", "min_loss_scale 4.0"),
        ),
        (["runner_wrapper.scale_sense={scale_factor: 1}"], ("scale_factor is 1.0",)),
        (["runner_config.global_batch_size=9"], ("global_batch_size 9", "batch_size 8", "= 8")),
        (
            ["runner_config.global_batch_size=32", "runner_config.gradient_accumulation_steps=3"],
            ("global_batch_size 32", "gradient_accumulation_steps 3", "= 24"),
        ),
        (
            ["runner_config.stop_at_step=9", "runner_config.max_steps=5"],
            ("stop_at_step 9", "max_steps 5"),
        ),
        (["train_dataset.input_columns=[input_id]"], ("'input_id'", "did you mean input_ids")),
        (["train_dataset.input_columns=[labels]"], ("train_dataset.input_columns", "lacks")),
        (["callbacks.1.keep_checkpoint_max=0"], ("callbacks.1.keep_checkpoint_max is 0",)),
        (["callbacks.1.prefix=a/b"], ("callbacks.1.prefix", "'a/b'")),
        (["callbacks.0={type: CheckpointMonitor}"], ("callbacks.0 and callbacks.1",)),
        (["eval_epoch_interval=0"], ("eval_epoch_interval is 0",)),
        (["do_eval=True", "eval_epoch_interval=-1"], ("do_eval is True", "-1")),
        (["seed=-1"], ("seed is -1", "at least 0")),
        (["seed=4294967296"], ("seed is 4294967296", "at most 4294967295")),
        (["context.max_device_memory='58'"], ("context.max_device_memory", "58GB")),
    ],
)
def test_a_contradiction_is_named(overrides, parts):
    message = problems(TINY, *overrides)
    for part in parts:
        assert part in message
    assert message.count("\n") <= 1, "one mistake must not be reported in many ways"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel_config.expert_parallel=3"], ("expert_num 8", "expert_parallel 3")),
        (["parallel_config.data_parallel=4"], ("data_parallel 4", "expert_parallel 8")),
        (["parallel_config.model_parallel=3"], ("num_heads 32", "model_parallel 3")),
        (["parallel_config.model_parallel=16"], ("n_kv_heads 8", "model_parallel 16")),
        (["parallel_config.model_parallel=3"], ("intermediate_size 14336", "vocab_size 32000")),
        (["parallel_config.pipeline_stage=3"], ("num_layers 32", "pipeline_stage 3", "[0, 0, 2]")),
        (["model.model_config.offset=[1, 1]"], ("offset [1, 1]", "adds up to 2")),
        (["model.model_config.offset=[-16, 16]"], ("without a layer", "[0, 32]")),
        (["parallel_config.micro_batch_num=1"], ("micro_batch_num 1", "pipeline_stage 2")),
        (["parallel_config.context_parallel=3"], ("seq_length 4096",)),
        (["runner_config.global_batch_size=100"], ("micro_batch_num 16", "= 128")),
    ],
)
def test_what_is_split_must_divide(overrides, parts):
    message = problems(BIG, *overrides)
    for part in parts:
        assert part in message


def test_parallel_sizes_are_ignored_on_one_process_as_in_mindformers():
    config = load_config(BIG, ["use_parallel=False", "parallel_config.model_parallel=7"])
    check_config(config, needs_paths=False)
    assert rank_count(config) == sequences_per_micro_step(config) == 1


@pytest.mark.parametrize(
    ("use_parallel", "world_size", "part"),
    [
        (True, 1, "= 16 ranks, but 1 process was started"),
        (True, 8, "= 16 ranks, but 8 processes were started"),
        (False, 4, "use_parallel False, but 4 processes"),
    ],
)
def test_ranks_against_processes(use_parallel, world_size, part):
    config = load_config(BIG, [f"use_parallel={use_parallel}"])
    with pytest.raises(UserError, match=part):
        check_config(config, world_size=world_size, needs_paths=False)


@pytest.mark.parametrize(
    ("run_mode", "stages", "world_size"), [("train", 2, 16), ("eval", 2, 16), ("predict", 1, 8)]
)
def test_as_many_processes_as_ranks_are_accepted(run_mode, stages, world_size):
    keys = [f"run_mode={run_mode}", f"parallel_config.pipeline_stage={stages}"]
    config = load_config(BIG, ["use_parallel=True", *keys])
    check_config(config, world_size=world_size, needs_paths=False)


def test_all_contradictions_come_together():
    config = load_config(TINY, ["moe_config.num_experts_chosen=9", "callbacks.1.prefix=''"])
    with pytest.raises(UserError) as caught:
        check_config(config, world_size=2)
    message = str(caught.value)
    assert message.startswith("4 contradictions")
    for part in ("num_experts_chosen", "callbacks.1.prefix", "use_parallel", "--train_data"):
        assert part in message


def test_numbers_made_in_python_are_checked_too():
    config = load_config(TINY)
    config.optimizer = dataclasses.replace(config.optimizer, eps=float("nan"))
    assert find_contradictions(config) == ["optimizer.eps is nan: it must be a finite number"]


def test_global_batch_size_sets_the_accumulation():
    config = load_config(TINY, ["runner_config.global_batch_size=32"])
    assert config.runner_config.gradient_accumulation_steps == 4
    assert not find_contradictions(config)


def test_warmup_given_as_zero_steps_beside_a_ratio():
    config = load_config(TINY, ["lr_schedule.warmup_steps=0"])
    assert (config.lr_schedule.warmup_ratio, config.lr_schedule.warmup_steps) == (0.05, None)
    assert not find_contradictions(config)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "train_dataset.data_loader.dataset_dir is empty, but run_mode train"),
        (["train_dataset.data_loader.dataset_dir=/no/where"], "path does not exist: /no/where"),
        (["train_dataset=null", "train_dataset_task=null"], "set --train_data"),
        (["run_mode=eval"], "eval_dataset.data_loader.dataset_dir is empty"),
        (["do_eval=True"], "set --eval_dataset_dir"),
        (["load_checkpoint=/no/where"], "load_checkpoint: path does not exist"),
        (["src_strategy_path_or_dir=/no/where"], "src_strategy_path_or_dir: path does not exist"),
        (["output_dir=''"], "output_dir is empty"),
        (["model.model_config.checkpoint_name_or_path=llama2_7b"], "load_checkpoint: path"),
    ],
)
def test_missing_paths(overrides, part):
    with pytest.raises(UserError) as caught:
        check_config(load_config(TINY, overrides))
    assert part in str(caught.value)


def test_output_dir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(TINY, [f"output_dir={tmp_path}/file/run"])
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_config(config)


def test_paths_that_exist_pass(tmp_path):
    config = load_config(TINY, [f"train_dataset.data_loader.dataset_dir={tmp_path}"])
    check_config(config)


_SIZES = st.dictionaries(
    st.sampled_from(
        [
            *("model.model_config." + key for key in ("num_layers", "num_heads", "n_kv_heads")),
            *("model.model_config." + key for key in ("head_dim", "vocab_size", "seq_length")),
            *("parallel_config." + key for key in ("data_parallel", "model_parallel")),
            *("parallel_config." + key for key in ("expert_parallel", "pipeline_stage")),
            *("parallel_config." + key for key in ("micro_batch_num", "context_parallel")),
            *("moe_config." + key for key in ("expert_num", "num_experts_chosen")),
            *("runner_config." + key for key in ("batch_size", "global_batch_size", "epochs")),
        ]
    ),
    st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 31, 64]),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(_SIZES, st.sampled_from(["train", "predict"]))
def test_sizes_are_refused_or_can_be_laid_out(sizes, run_mode):
    """What the checks let through, the layout and the memory plan can split."""
    whole = ["parallel_config.pipeline_stage=1"] if run_mode == "predict" else []
    overrides = [*whole, *(f"{key}={value}" for key, value in sizes.items())]
    try:
        config = load_config(BIG, [*overrides, f"run_mode={run_mode}"])
        check_config(config, world_size=None, needs_paths=False)
    except UserError as error:
        assert any(key.split(".")[-1] in str(error) for key in sizes)
        return
    assert "parameters:" in describe(config)
