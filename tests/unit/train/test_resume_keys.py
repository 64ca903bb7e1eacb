"""A resume with other keys: refused where the network or the data would be others, else said."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.played import played_run
from helpers.runs import make_run

from mixtral_ms.checkpoint.store.store import load_checkpoint, save_checkpoint
from mixtral_ms.config import load_config
from mixtral_ms.convert.run_weights import open_run_weights
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.state.rank_agreement import Storage
from mixtral_ms.train.state.resume import find_resume

MODEL = "model.model_config."
NETWORKS = [
    # keys that leave every shape as it is, and what is said of them
    ([MODEL + "num_heads=2", MODEL + "n_kv_heads=1", MODEL + "head_dim=16"], "num_heads was 4", 2),
    ([MODEL + "theta=50.0"], "theta was 10000.0", 50.0),
    ([MODEL + "rms_norm_eps=1e-2"], "rms_norm_eps was 1e-05", 0.01),
    ([MODEL + "sliding_window=2"], "sliding_window was None", 2),
    (["moe_config.num_experts_chosen=1"], "num_experts_chosen was 2", 1),
    (["moe_config.norm_topk_prob=False"], "norm_topk_prob was True", False),
    (["moe_config.uniform_routing=True"], "uniform_routing was False", True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    """A run of 8 steps that has stopped behind its third."""
    folder = tmp_path_factory.mktemp("resume_keys")
    make_run(folder)
    stop = ["do_eval=False", "runner_config.stop_at_step=3"]
    played_run(load_config(folder / "run.yaml", stop)).run()
    return folder


@pytest.fixture
def resume(folder, tmp_path):
    """Takes up a copy of the run with some keys; gives the run."""
    shutil.copytree(folder / "output", tmp_path / "out")

    def take_up(*overrides):
        given = [f"output_dir={tmp_path / 'out'}", "resume_training=True", "do_eval=False"]
        return played_run(load_config(folder / "run.yaml", [*given, *overrides]))

    return take_up


@pytest.mark.parametrize(("keys", "was", "now"), NETWORKS)
def test_another_network_of_the_same_shapes_is_not_resumed(resume, keys, was, now):
    with pytest.raises(UserError) as caught:
        resume(*keys)
    assert f"{was} and is {now}" in str(caught.value)
    assert "it is of another network" in str(caught.value)
    assert "--resume_training False --load_checkpoint" in str(caught.value)


@pytest.mark.parametrize(("keys", "was", "now"), NETWORKS)
@pytest.mark.parametrize("form", ["", "/mixtral-step_0000003", "/mixtral-step_0000003/rank_0"])
def test_every_way_to_name_weights_says_that_they_are_of_another_network(
    folder, capsys, keys, was, now, form
):
    given = [f"load_checkpoint={folder}/output/checkpoint{form}", *keys]
    open_run_weights(load_config(folder / "run.yaml", given))
    key, _, value = was.partition(" was ")
    said = f"state.json says {key} {value}, this run's configuration {now}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["", "/mixtral-step_0000003"])
def test_the_same_network_needs_no_word(folder, capsys, form):
    given = [f"load_checkpoint={folder}/output/checkpoint{form}"]
    open_run_weights(load_config(folder / "run.yaml", given))
    assert "says" not in capsys.readouterr().err


DATA = [
    ("train_dataset.data_loader.num_samples=16", "records was 22 and is 16"),
    (MODEL + "pad_token_id=7", "pad_token_id was -1 and is 7"),
    (MODEL + "ignore_token_id=-5", "ignore_token_id was -100 and is -5"),
    ("seed=4", "seed was 3 and is 4"),
    ("train_dataset.data_loader.shuffle=False", "shuffle was True and is False"),
    ("runner_config.gradient_accumulation_steps=1", "rows_per_step was 8 and is 4"),
]


@pytest.mark.parametrize(("key", "said"), DATA)
def test_other_data_is_told_by_what_differs(resume, key, said):
    with pytest.raises(UserError) as caught:
        resume(key)
    assert said in str(caught.value)


SCHEDULE = [
    ("runner_config.epochs=6", ["total_steps was 8 and is 12", "the learning rate of step 4 is"]),
    ("runner_config.max_steps=20", ["total_steps was 8 and is 20", "and would have been"]),
    ("lr_schedule.learning_rate=1e-3", ["lr_schedule.learning_rate was 0.01 and is 0.001"]),
    ("lr_schedule.lr_end=0.0", ["lr_schedule.lr_end was 0.001 and is 0.0"]),
    ("lr_schedule.type=LinearWithWarmUpLR", ["was 'CosineWithWarmUpLR' and is 'LinearWith"]),
    ("lr_schedule.warmup_steps=4", ["lr_schedule.warmup_steps was 2 and is 4"]),
    ("optimizer.weight_decay=0.0", ["optimizer.weight_decay was 0.1 and is 0.0"]),
    ("optimizer.betas=[0.9, 0.99]", ["optimizer.betas.1 was 0.95 and is 0.99"]),
    ("optimizer.eps=1e-6", ["optimizer.eps was 1e-08 and is 1e-06"]),
    ("runner_wrapper.max_grad_norm=2.0", ["runner_wrapper.max_grad_norm was 1.0 and is 2.0"]),
    ("moe_config.aux_loss_factor=0.5", ["moe_config.aux_loss_factor was 0.02 and is 0.5"]),
    ("moe_config.capacity_factor=1.5", ["moe_config.capacity_factor was -1.0 and is 1.5"]),
    (MODEL + "compute_dtype=bfloat16", ["compute_dtype was 'float32' and is 'bfloat16'"]),
]


@pytest.mark.parametrize(("key", "parts"), SCHEDULE)
def test_what_trains_otherwise_is_one_line(resume, capsys, key, parts):
    resume(key)
    lines = [s for s in capsys.readouterr().err.splitlines() if "trains otherwise" in s]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]


QUIET = [
    "output_dir={out}",  # nothing at all
    "callbacks.0.save_checkpoint_steps=1",
    "optimizer.type=AdamWeightDecay",
    "runner_config.stop_at_step=5",
]


@pytest.mark.parametrize("key", QUIET)
def test_what_trains_alike_needs_no_line(resume, capsys, tmp_path, key):
    resume(key.format(out=tmp_path / "out"))
    assert "trains otherwise" not in capsys.readouterr().err


WRONG_STATES = [
    ("step", "3", "'step': a text, but must be a whole number"),
    ("step", -3, "step is -3; it must be 0 or more"),
    ("optimizer_updates", -1, "optimizer_updates is -1; it must be 0 or more"),
    ("optimizer_updates", None, "'optimizer_updates': null, but must be a whole number"),
    ("loss_scale", {}, "'loss_scale': lacks 'value'"),
    ("loss_scale", {"value": 0, "good_steps": 0, "skipped_in_a_row": 0}, "loss_scale.value is 0"),
    ("data", [], "'data': a list, but must be an object"),
    ("data", {"seed": 3}, "'data': lacks 'fingerprint'"),
    ("training", {"keys": []}, "'training': 'keys': a list, but must be an object"),
    ("model_config", {"num_head": 4}, "num_head"),
    ("model_config", {"num_heads": "four"}, "num_heads"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG_STATES)
def test_a_state_that_is_none_is_named_by_file_and_key(folder, tmp_path, key, value, said):
    config = load_config(folder / "run.yaml", ["resume_training=True", "do_eval=False"])
    found = find_resume(config, Mesh(), Storage())
    spoilt = replace(found, state={**found.state, key: value})
    run = played_run(load_config(folder / "run.yaml", [f"output_dir={tmp_path}", "do_eval=False"]))
    with pytest.raises(UserError) as caught:
        run._restore(spoilt)
    assert said in str(caught.value) and "state.json" in str(caught.value)


def test_a_checkpoint_of_before_these_were_kept_is_resumed(resume, tmp_path, capsys):
    root = tmp_path / "out" / "checkpoint"
    old = load_checkpoint(root / "mixtral-step_0000003")
    state = {key: value for key, value in old.state.items() if key != "training"}
    kept = {"records", "pad_token_id", "ignore_token_id"}
    state["data"] = {key: value for key, value in old.state["data"].items() if key not in kept}
    tensors = {stem: {n: np.array(a) for n, a in old.tensors[stem].items()} for stem in old.tensors}
    save_checkpoint(root, "mixtral-step_0000003", tensors, state)
    assert resume("optimizer.eps=1e-6").resumed_step == 3
