"""The reference document's way to fine-tune, on real rows, until the answers are known by heart.

A network of nine million parameters learns to write from 999 rows; all its weights, or adapters
alone, then learn 100 other rows until they can be recited.
"""

import json
import shutil
import subprocess
import sys

import pytest
from fastchat.conversation import get_conv_template
from helpers.runs import ROOT, assert_same_run, environment
from sentencepiece import SentencePieceProcessor

from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer

pytestmark = [pytest.mark.long, pytest.mark.timeout(5400)]

SEQ_LENGTH = 512
NETWORK = {
    "model.model_config.seq_length": SEQ_LENGTH,
    "model.model_config.hidden_size": 128,
    "model.model_config.num_layers": 2,
    "model.model_config.intermediate_size": 256,
    "moe_config.expert_num": 4,
}
TRAINING = {
    # Adapters leave the head alone: its rows must be long enough for a probability near 1.
    "model.model_config.init_method_std": 0.2,
    "moe_config.aux_loss_factor": 0.001,
    "runner_config.batch_size": 2,
    "runner_config.peak_tflops": 1,
    "train_dataset.input_columns": ["input_ids", "labels"],
}
PET = {
    "model.model_config.pet_config": "{lora_rank: 64, lora_alpha: 128, lora_dropout: 0.0, "
    "target_modules: '.*w[qkvo]|.*w[123]'}"
}
WAYS = {
    "full": {"runner_config.epochs": 30, "lr_schedule.learning_rate": 2e-3},
    "lora": {"runner_config.epochs": 60, "lr_schedule.learning_rate": 5e-3, **PET},
}
"""What to set to train all weights, and adapters alone."""
MIDDLE, AFTER = 150, 20
"""Steps before a checkpoint in the middle, and behind it before a stop."""
RECITED = 32
"""Tokens of an answer that are compared."""


class Workshop:
    """A folder in which commands are run as a user types them."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def python(self, script, *arguments):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=2400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, yaml, sets, *flags):
        """run_mindformer.py with one of the tiny YAMLs, its network made smaller still."""
        words = [
            w for key, value in {**NETWORK, **sets}.items() for w in ("--set", f"{key}={value}")
        ]
        config = ROOT / f"research/mixtral_tiny/{yaml}_mixtral-tiny.yaml"
        return self.python("run_mindformer.py", "--config", config, *words, *flags)

    def preprocess(self, name):
        """A file of rows to packed records."""
        rows = self.data / f"{name}.json"
        tools = "tools/dataset_preprocess"
        self.python(
            f"{tools}/alpaca_converter.py",
            "--data_path",
            rows,
            "--output_path",
            f"{name}.conversations.json",
        )
        where = (
            "--input_glob",
            f"{name}.conversations.json",
            "--output_file",
            f"{name}.mindrecord",
        )
        what = ("--dataset_type", "qa", "--seq_length", SEQ_LENGTH, "--packing")
        tokenizer = ("--model_file", "tokenizer.model")
        return self.python(f"{tools}/llama_preprocess.py", *what, *where, *tokenizer)

    def finetune(self, name, sets, *flags):
        weights = ("--load_checkpoint", "pretrained/checkpoint", "--output_dir", name)
        records = ("--run_mode", "finetune", "--train_data", "alpaca_100.mindrecord")
        self.run("finetune", {**TRAINING, **sets}, *weights, *records, *flags)

    def loss(self, sets):
        """What --run_mode eval says of the 100 rows."""
        records = ("--run_mode", "eval", "--eval_data", "alpaca_100.mindrecord")
        printed = self.run("finetune", {**TRAINING, **sets}, *records)
        return float(printed.split()[1])


@pytest.fixture(scope="module")
def workshop(request, tmp_path_factory):
    """Records of 100 rows, and weights that were trained on 999 others in pretrained/."""
    data = request.config.getoption("--data") / "alpaca"
    if not data.is_dir():
        pytest.skip(f"{data} is not there: give --data")
    workshop = Workshop(tmp_path_factory.mktemp("alpaca"), data)
    shutil.copy(find_example_tokenizer(), workshop.folder / "tokenizer.model")
    workshop.preprocess("alpaca_en_999")
    assert "100 taken; 0 left out, 0 cut" in workshop.preprocess("alpaca_100")
    records = ("--train_data", "alpaca_en_999.mindrecord", "--output_dir", "pretrained")
    sets = {**TRAINING, "model.model_config.pad_token_id": 0, "lr_schedule.learning_rate": 2e-3}
    workshop.run("pretrain", sets, *records, "--epochs", 1)
    return workshop


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_learnt_by_heart(workshop, way):
    learn(workshop, way)
    trained = weights_of(way)
    assert workshop.loss(weights_of("pretrained")) > 3
    assert workshop.loss(trained) < 0.1
    assert recited(workshop, trained) >= 90


def learn(workshop, way):
    """A run that is stopped behind its middle and taken up; once more from its middle on.

    What was computed without a break between the middle and the stop must come out of the
    resumed run bit for bit.
    """
    stop = {"runner_config.stop_at_step": MIDDLE + AFTER}
    save = {"callbacks.1.save_checkpoint_steps": MIDDLE}
    workshop.finetune(way, {**WAYS[way], **stop, **save})
    middle = f"mixtral-tiny-step_{MIDDLE:07}"
    again = workshop.folder / f"{way}_again"
    shutil.copytree(workshop.folder / way, again)
    shutil.rmtree(again / "checkpoint" / f"mixtral-tiny-step_{MIDDLE + AFTER:07}")
    workshop.finetune(again.name, {**WAYS[way], **stop}, "--resume_training", middle)
    assert_same_run(again, workshop.folder / way)
    workshop.finetune(way, WAYS[way], "--resume_training", "True")


def weights_of(run):
    """What to set to load what a run has made."""
    if run != "lora":
        return {"load_checkpoint": f"{run}/checkpoint"}
    return {"load_checkpoint": "pretrained/checkpoint", "adapter": "lora/checkpoint"}


def recited(workshop, trained):
    """How many of the 100 answers begin as they should, greedily and token by token."""
    tokenizer = SentencePieceProcessor(model_file=str(workshop.folder / "tokenizer.model"))
    talks = [
        one["conversations"]
        for one in json.loads((workshop.folder / "alpaca_100.conversations.json").read_text())
    ]
    prompts, answers = workshop.folder / "prompts.jsonl", workshop.folder / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt(talk)}) + "\n" for talk in talks))
    flags = ("--vocab_file", "tokenizer.model", "--predict_data", prompts, "--output_file", answers)
    limit = ("--overwrite", "--max_new_tokens", RECITED)
    workshop.run("predict", trained, *flags, *limit)
    given = [json.loads(line)["token_ids"] for line in answers.read_text().splitlines()]
    wanted = [[*tokenizer.encode(talk[1]["value"]), tokenizer.eos_id()][:RECITED] for talk in talks]
    return sum(map(list.__eq__, given, wanted))


def prompt(talk):
    """A question as it stands before the answer in training."""
    template = get_conv_template("vicuna_v1.1")
    template.append_message(template.roles[0], talk[0]["value"])
    template.append_message(template.roles[1], None)
    return template.get_prompt()
