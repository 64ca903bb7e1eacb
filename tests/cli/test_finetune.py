"""Fine-tuning as a user types it: full and LoRA, stopped and taken up again, evaluated."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from helpers.runs import (
    SEQ_LENGTH,
    VOCAB,
    assert_same_run,
    final_tensors,
    metrics_of,
    tiny_config,
)
from mindspore import Tensor

from mixtral_ms.cli.commands.run import main
from mixtral_ms.config import load_config
from mixtral_ms.convert.formats.found_weights import find_weights
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.convert.job.output_record import description
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY
from mixtral_ms.data.mindrecord.reader import MindRecords
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.evaluation import dropless
from mixtral_ms.train.state.lora_run import _base_for_peft

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("graph")]
PET = "{lora_rank: 4, lora_alpha: 64, lora_dropout: 0.1, target_modules: '.*w[qkvo]|.*w[123]'}"
LORA = ("--set", f"model.model_config.pet_config={PET}")
ANSWER = SEQ_LENGTH // 2
TEMPLATE = {"name": "mistral"}


def write_instructions(path, rows, seed):
    """Random ids of which only the second half is supervised."""
    ids = np.random.RandomState(seed).randint(1, VOCAB, (rows, SEQ_LENGTH + 1)).astype(np.int32)
    labels = ids.copy()
    labels[:, :ANSWER] = -100
    facts = {CHAT_TEMPLATE_KEY: TEMPLATE}
    with RecordWriter(path, ("input_ids", "labels"), facts=facts) as writer:
        writer.write(input_ids=ids, labels=labels)


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """Weights of a run in pretrained/, instructions, and finetune.yaml."""
    import mindspore  # noqa: PLC0415

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    folder = tmp_path_factory.mktemp("finetune")
    shutil.copytree(tiny_run / "output", folder / "pretrained")
    write_instructions(folder / "train.qa.mindrecord", 22, seed=0)
    write_instructions(folder / "eval.qa.mindrecord", 7, seed=1)
    config = tiny_config(folder)
    config["run_mode"] = "finetune"
    for name in ("train", "eval"):
        section = config[f"{name}_dataset"]
        section["data_loader"]["dataset_dir"] = str(folder / f"{name}.qa.mindrecord")
        section["input_columns"] = ["input_ids", "labels"]
    (folder / "finetune.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def finetune(folder):
    def run(name, *arguments, load="pretrained/checkpoint"):
        weights = ("--load_checkpoint", f"{folder / load}") if load else ()
        where = ("--output_dir", f"{folder / name}")
        return main(["--config", f"{folder / 'finetune.yaml'}", *where, *weights, *arguments])

    return run


def in_one_go(folder, name, *arguments):
    where = ("--output_dir", f"{folder / name}")
    weights = ("--load_checkpoint", f"{folder / 'pretrained' / 'checkpoint'}")
    main(["--config", f"{folder / 'finetune.yaml'}", *where, *weights, *arguments])
    return folder / name


@pytest.fixture(scope="module")
def adapted(folder):
    """A LoRA run in one go; its output folder."""
    return in_one_go(folder, "lora", *LORA)


@pytest.fixture(scope="module")
def whole(folder):
    """A run on all weights in one go; its output folder."""
    return in_one_go(folder, "whole")


def test_it_starts_from_weights(finetune):
    with pytest.raises(UserError, match="finetune starts from weights.*--load_checkpoint"):
        finetune("nothing", load=None)
    with pytest.raises(UserError, match="LoRA trains adapters for weights.*--load_checkpoint"):
        finetune("nothing", "--run_mode", "train", *LORA, load=None)


def test_full_finetuning_resumes_bit_for_bit(finetune, folder, whole):
    finetune("parts", "--runner_config.stop_at_step", "3")
    finetune("parts", "--resume_training", "True")
    assert_same_run(folder / "parts", whole)
    tokens = {record["tokens"] for record in metrics_of(whole) if "lm_loss" in record}
    assert tokens == {2 * 4 * (SEQ_LENGTH + 1 - ANSWER)}  # the supervised ones of a step alone


def test_the_chat_template_goes_with_what_is_trained(folder, adapted, whole, tmp_path):
    for run in (adapted, whole):
        assert find_weights(run / "checkpoint").chat_template == TEMPLATE
    assert find_weights(folder / "pretrained/checkpoint").chat_template is None
    for weights, adapter in ((whole, None), (folder / "pretrained", adapted / "checkpoint")):
        conversion = prepare(
            ConvertOptions(weights / "checkpoint", tmp_path / "out", to="hf", merge_lora=adapter)
        )
        written = description(conversion.plan, conversion.found, conversion.chat_template)
        assert written[CHAT_TEMPLATE_KEY] == TEMPLATE


def test_lora_resumes_bit_for_bit(finetune, folder, adapted):
    finetune("lora_parts", *LORA, "--runner_config.stop_at_step", "3")
    finetune("lora_parts", *LORA, "--resume_training", "True")
    assert_same_run(folder / "lora_parts", adapted)


def test_a_lora_checkpoint_holds_adapters_alone(adapted, folder):
    newest = adapted / "checkpoint" / (adapted / "checkpoint" / "latest").read_text().strip()
    assert {path.stem for path in (newest / "rank_0").iterdir()} == {"adapter", "optimizer"}
    names = final_tensors(adapted).keys()
    assert names and all(re.search(r"\.lora_[ab]$", name) for name in names)
    state = json.loads((newest / "state.json").read_text())
    assert state["base"]["path"] == str(folder / "pretrained" / "checkpoint")
    assert {path.name for path in (adapted / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_peft_is_told_of_a_folder_that_transformers_opens(adapted, folder, tmp_path):
    """Of a run's checkpoint it cannot; of one that was converted it can open the source."""
    written = json.loads((adapted / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] is None
    source = tmp_path / "hf"
    convert(prepare(ConvertOptions(folder / "pretrained" / "checkpoint", source, "hf")))
    convert(prepare(ConvertOptions(source, tmp_path / "m.ckpt", "ours")))
    config = load_config(folder / "finetune.yaml")
    for weights in (source, tmp_path / "m.ckpt"):
        config.load_checkpoint = str(weights)
        assert _base_for_peft(config) == str(source)
    config.load_checkpoint = str(tmp_path / "gone")
    assert _base_for_peft(config) is None


def test_eval_of_weights_and_adapter_is_what_the_run_measured(finetune, adapted, capsys):
    last = [record for record in metrics_of(adapted) if record["kind"] == "eval"][-1]
    capsys.readouterr()
    finetune("eval", "--run_mode", "eval", "--set", f"adapter={adapted / 'checkpoint'}")
    with_adapter = float(capsys.readouterr().out.split()[1])
    assert with_adapter == pytest.approx(last["loss"], abs=1e-5)
    finetune("eval", "--run_mode", "eval")
    assert abs(float(capsys.readouterr().out.split()[1]) - with_adapter) > 1e-3


def test_an_adapter_is_trained_on(finetune, folder, adapted):
    go_on = ("--set", f"adapter={adapted / 'checkpoint'}")
    finetune("more", *LORA, *go_on, "--runner_config.stop_at_step", "1")
    # the first step's rate is 0: the weights that were given come out
    more, before = final_tensors(folder / "more"), final_tensors(adapted)
    for name in before:
        if not name.startswith("adam"):
            np.testing.assert_array_equal(more[name], before[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "model.model_config.pet_config.lora_alpha=9"), "lora_alpha was 64.0 and is 9.0"),
        (("--set", "model.model_config.pet_config=null"), "holds adapters.* trains whole weights"),
    ],
)
def test_a_resume_with_another_adapter_is_refused(finetune, adapted, arguments, message):
    with pytest.raises(UserError, match=message):
        finetune(adapted.name, *LORA, "--resume_training", "True", *arguments)


def test_other_weights_beneath_an_adapter_are_refused(finetune, whole, adapted):
    other = f"{whole.name}/checkpoint"
    with pytest.raises(UserError, match="made for the weights of .*pretrained.* are others"):
        finetune(adapted.name, *LORA, "--resume_training", "True", load=other)
    key = ("--set", f"adapter={adapted / 'checkpoint'}")
    with pytest.raises(UserError, match="made for the weights of .*pretrained.* are others"):
        finetune("eval", "--run_mode", "eval", *key, load=other)


@pytest.mark.parametrize(
    ("change", "load", "message"),
    [
        (("--set", "model.model_config.pet_config.lora_alpha=9"), "pretrained", "alpha 64 .*is 9"),
        ((), "{whole}", "made for the weights of .*pretrained.* are others"),
    ],
)
def test_an_adapter_is_trained_on_as_it_was(finetune, whole, adapted, change, load, message):
    key = ("--set", f"adapter={adapted / 'checkpoint'}")
    load = f"{load.format(whole=whole.name)}/checkpoint"
    with pytest.raises(UserError, match=message):
        finetune("on", *LORA, *key, *change, load=load)


def test_an_adapter_is_no_weights(finetune):
    with pytest.raises(UserError, match="holds an adapter: give --load_checkpoint the weights"):
        finetune("eval", "--run_mode", "eval", load="lora/checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("target_modules=.*nothing", "means no module.*attention.wq"),
        ("target_modules='*wq'", "is not a regular expression"),
        ("lora_rank=0", "lora_rank is 0: it must be at least 1"),
        ("lora_dropout=1", "less than 1"),
        ("rank=4", "rank.*lora_rank"),
        ("exclude_layers=['x']", "exclude_layers.*target_modules"),
    ],
)
def test_a_wrong_pet_config_is_refused(finetune, change, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        finetune("wrong", *LORA, "--set", f"model.model_config.pet_config.{change}")


def test_the_report_shows_answers_before_and_after(finetune, folder, whole):
    tokenizer = find_example_tokenizer()
    finetune(
        "samples",
        *("--vocab_file", str(tokenizer), "--do_eval", "False", "--runner_config.max_steps", "3"),
        *("--set", "callbacks=[{type: SampleMonitor, rows: 2, max_new_tokens: 4}]"),
    )
    samples = json.loads((folder / "samples" / "samples.json").read_text())
    config = load_config(folder / "finetune.yaml").model.model_config
    for weights, key in (("pretrained", "before"), ("samples", "after")):
        answers = greedy_answers(folder / weights, config, rows_of(folder), most=4)
        assert [one[key] for one in samples] == [Tokenizer(tokenizer).decode(a) for a in answers]
    page = (folder / "samples" / "report.html").read_text()
    assert "Answers before and after" in page and page.count('class="sample"') == 2
    assert not (whole / "samples.json").exists()  # nobody asked for any


def rows_of(folder):
    """The prompts of the first rows kept apart."""
    section = load_config(folder / "finetune.yaml").eval_dataset
    rows = list(MindRecords(section.data_loader.dataset_dir, section.input_columns).read([0, 1]))
    return [ids[:ANSWER].tolist() for ids, _ in rows]


def greedy_answers(output, config, prompts, most):
    """One prompt at a time, by the network's logits, without padding."""
    network = MixtralForCausalLM(dropless(config), batch_size=1)
    tensors = final_tensors(output)
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(tensors[parameter.name]))
    network.set_train(False)
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + most:
            row = np.zeros((1, SEQ_LENGTH), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(network(Tensor(row)).asnumpy()[0, len(ids) - 1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def test_samples_need_a_tokenizer(finetune):
    with pytest.raises(UserError, match="SampleMonitor shows text.*--vocab_file"):
        finetune("wrong", "--set", "callbacks=[{type: SampleMonitor}]")
