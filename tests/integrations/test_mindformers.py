"""Our network driven by MindFormers' own Trainer, pipeline and YAMLs, beside our Trainer."""

import importlib
import subprocess

import numpy as np
import pytest
import sentencepiece
import yaml
from helpers.mindformers_env import in_mindformers, mindformers_python, tensors
from helpers.mindformers_sizes import (
    EVAL_ROWS,
    MOE,
    NETWORK,
    NEW_TOKENS,
    PROMPT,
    RATE,
    ROWS,
    SEQ_LENGTH,
    TRAIN_ROWS,
    VOCAB,
)
from helpers.runs import ROOT, metrics_of, run_command, write_records
from helpers.text import standard_library_text

from mixtral_ms import Trainer, load_config
from mixtral_ms.convert.formats.found_weights import find_weights
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.errors import MissingDependencyError

pytestmark = pytest.mark.timeout(400)
STEPS = TRAIN_ROWS // ROWS


def yaml_tree(folder, **changes):
    """A YAML with MindFormers' keys and names, which our Trainer reads as well."""
    data = {
        "data_loader": {
            "type": "MindDataset",
            "dataset_dir": str(folder / "train.mindrecord"),
            "shuffle": False,
        },
        "input_columns": ["input_ids"],
        "num_parallel_workers": 1,
        "drop_remainder": True,
    }
    return {
        "seed": 0,
        "output_dir": str(folder / "output"),
        "run_mode": "finetune",
        "load_checkpoint": "",
        "load_ckpt_format": "safetensors",
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "mixtral-8x7b"},
        "runner_config": {"epochs": 1, "batch_size": ROWS, "sink_mode": True, "sink_size": 1},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8},
        "lr_schedule": {"type": "CosineWithWarmUpLR", **RATE, "total_steps": -1},
        "moe_config": MOE,
        "train_dataset": data,
        "train_dataset_task": {"type": "CausalLanguageModelDataset", "dataset_config": data},
        "use_parallel": False,
        "parallel": {"parallel_mode": 1, "gradients_mean": False},
        "parallel_config": {"data_parallel": 1, "model_parallel": 1, "expert_parallel": 1},
        "callbacks": [
            {"type": "MFLossMonitor"},
            {
                "type": "CheckpointMonitor",
                "prefix": "mixtral-8x7b",
                "checkpoint_format": "safetensors",
                "save_checkpoint_steps": STEPS,
            },
        ],
        "context": {"mode": 0, "device_target": "CPU", "max_call_depth": 10000},
        "model": {
            "model_config": {
                "type": "LlamaConfig",
                "batch_size": 1,
                **NETWORK,
                "use_past": False,
                "do_sample": False,
                "max_decode_length": SEQ_LENGTH,
                "max_new_tokens": NEW_TOKENS,
            },
            "arch": {"type": "LlamaForCausalLM"},
        },
        "processor": {
            "type": "LlamaProcessor",
            "return_tensors": "ms",
            "tokenizer": {
                "type": "LlamaTokenizer",
                "vocab_file": str(folder / "tokenizer.model"),
            },
        },
        "runner_wrapper": {
            "type": "MFTrainOneStepCell",
            "scale_sense": {
                "type": "DynamicLossScaleUpdateCell",
                "loss_scale_value": 65536,
                "scale_factor": 2,
                "scale_window": 1000,
            },
            "use_clip_grad": True,
        },
        **changes,
    }


def write_yaml(path, tree):
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and tokenizer."""
    mindformers_python()
    folder = tmp_path_factory.mktemp("mindformers")
    train = write_records(folder / "train.mindrecord", TRAIN_ROWS, 0, SEQ_LENGTH + 1, VOCAB)
    held = write_records(folder / "held.mindrecord", EVAL_ROWS, 1, SEQ_LENGTH + 1, VOCAB)
    np.savez(folder / "rows.npz", train=train, eval=held)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library_text()[:60000].splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """A run of our Trainer: its YAML, records and the folder of its last checkpoint."""
    output = folder / "ours"
    path = write_yaml(
        folder / "ours.yaml", yaml_tree(folder, run_mode="train", output_dir=str(output))
    )
    done = run_command("--config", path, cwd=folder)
    assert done.returncode == 0, done.stderr
    records = [one for one in metrics_of(output) if one["kind"] == "train"]
    (checkpoint,) = (output / "checkpoint").glob("*-step_*4")
    return path, records, checkpoint


@pytest.fixture(scope="module")
def calls(folder):
    return in_mindformers("calls", folder)


@pytest.fixture(scope="module")
def finetuned(folder, ours):
    """What MindFormers' launcher made of our Trainer's weights."""
    _, _, checkpoint = ours
    output = folder / "finetuned"
    tree = yaml_tree(folder, output_dir=str(output), load_checkpoint=str(checkpoint / "rank_0"))
    tree["trainer"]["auto_register"] = "register.CausalLanguageModelingTrainer"
    write_yaml(folder / "finetune.yaml", tree)
    return in_mindformers("launch_finetune", folder), output


def weights_of(path, yaml_path):
    """All weights of a checkpoint as our package reads them."""
    source = open_weights(find_weights(path), load_config(yaml_path).model.model_config)
    return {name: np.array(source.read(name)) for name in source.infos}


def assert_equal_tensors(got, wanted):
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name].tobytes() != wanted[name].tobytes()] == []


def test_losses_are_those_of_our_trainer(calls, ours):
    _, records, _ = ours
    assert len(records) == STEPS
    np.testing.assert_allclose(calls["losses"], [one["loss"] for one in records], rtol=2e-6)
    np.testing.assert_allclose(calls["norms"], [one["grad_norm"] for one in records], rtol=1e-4)


def test_evaluation_is_that_of_our_trainer(calls, ours, folder):
    path, _, _ = ours
    (saved,) = (folder / "output/checkpoint_network/rank_0").glob("*.ckpt")
    evaluation = {**yaml_tree(folder)["train_dataset"], "batch_size": ROWS}
    evaluation["data_loader"] = {
        "type": "MindDataset",
        "dataset_dir": str(folder / "held.mindrecord"),
    }
    tree = yaml.safe_load(path.read_text()) | {"eval_dataset": evaluation, "run_mode": "eval"}
    tree["load_checkpoint"] = str(saved)
    write_yaml(folder / "eval.yaml", tree)
    result = Trainer(folder / "eval.yaml").evaluate()
    assert calls["evaluated"]["loss"] == pytest.approx(result.loss, rel=2e-6)


def test_prediction_and_fine_tuning_work(calls):
    assert calls["sampled"].startswith(PROMPT)
    assert calls["piped"].startswith(PROMPT)
    assert len(calls["piped"]) > len(PROMPT)
    assert len(calls["finetuned"]) == STEPS
    assert calls["finetuned"][0] < calls["losses"][0] - 0.1  # from the weights of the training


def test_our_package_reads_what_mindformers_saved(calls, ours, finetuned, folder):
    yaml_path = ours[0]
    (saved,) = (folder / "output/checkpoint_network/rank_0").glob("*.ckpt")
    assert_equal_tensors(weights_of(saved, yaml_path), tensors(folder / "trained.npz"))
    result, output = finetuned
    assert result["network"] == "MixtralForCausalLM"
    (saved,) = (output / "checkpoint/rank_0").glob("*.safetensors")
    assert_equal_tensors(weights_of(saved, yaml_path), tensors(folder / "finetune.npz"))


def test_mindformers_reads_and_answers_what_our_trainer_saved(folder, ours):
    """The YAML of prediction, with use_past, from our checkpoint: our tensors and our answer."""
    path, _, checkpoint = ours
    tree = yaml_tree(folder, run_mode="predict", load_checkpoint=str(checkpoint / "rank_0"))
    tree["model"]["model_config"]["use_past"] = True
    write_yaml(folder / "predict.yaml", tree)
    result = in_mindformers("launch_predict", folder)
    assert_equal_tensors(tensors(folder / "predict.npz"), weights_of(checkpoint, path))
    tree["load_checkpoint"] = str(checkpoint)
    write_yaml(folder / "answer.yaml", tree)
    (answer,) = Trainer(folder / "answer.yaml").predict(PROMPT)
    assert result["answer"] == PROMPT + answer.text


def test_losses_of_data_of_all_kinds(folder):
    found = in_mindformers("losses", folder)
    trained, evaluated = found["whole"]
    assert trained == pytest.approx(evaluated, rel=1e-6)
    assert found["sliced"] == pytest.approx(trained, rel=1e-6)
    trained, evaluated = found["fewer_rows"]
    assert trained == pytest.approx(evaluated, rel=1e-6)
    assert found["part"] == pytest.approx([found["part"][0]] * 3, rel=1e-6)
    assert "fit_batch_size" in found["more_rows"]


def test_steps_names_and_refusals(folder, ours):
    found = in_mindformers("steps", folder)
    assert found["overflow"] == [[True, False], [False, True]]
    assert found["names"] == sorted(weights_of(ours[2], ours[0]))
    ours_, theirs = found["types"]
    assert ours_.startswith("mixtral_ms.")
    assert theirs.startswith("mindformers.")
    named = (
        "expert_num 1",
        "TopkRouterV1",
        "shared_expert_num 1",
        "model_parallel 2",
        "pet_config",
    )
    for message, name in zip(found["refused"], named, strict=True):
        assert name in message


def test_our_package_alone_does_not_import_mindformers():
    statement = "import mixtral_ms, mixtral_ms.cli.commands.run; from mixtral_ms import Trainer"
    code = f"{statement}; import sys; sys.exit('mindformers' in sys.modules)"
    environment = {"PYTHONPATH": str(ROOT)}
    subprocess.run([mindformers_python(), "-c", code], env=environment, timeout=120, check=True)


def test_without_mindformers_the_command_is_named():
    with pytest.raises(MissingDependencyError, match=r'pip install "mixtral-ms\[mindformers\]"'):
        importlib.import_module("mixtral_ms.integrations.mindformers")


@pytest.mark.long
def test_the_network_of_mindformers_itself_fails_on_cpu(folder):
    assert in_mindformers("upstream", folder) == []
