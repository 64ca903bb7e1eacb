"""`mixtral_ms.pipeline`: one line from a model in any place to text."""

import json
import shutil

import pytest
from helpers.answering import make_model, network

import mixtral_ms
from mixtral_ms import Trainer, load_config
from mixtral_ms.cli.commands.convert import main as convert
from mixtral_ms.convert.formats.write_config import to_huggingface
from mixtral_ms.errors import UserError

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPTS = ["hello", "The import statement"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model):
    answers = Trainer(load_config(model, ["model.model_config.max_new_tokens=6"])).predict(PROMPTS)
    return [{"text_generation_text": [one.prompt + one.text]} for one in answers]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Hugging Face's names and config.json, with the tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    weights = model.parent / "weights"
    written = to_huggingface(network(model), {}, "float32")["config.json"]
    (weights / "config.json").write_text(json.dumps(written))
    convert(["--reversed", "--input_path", str(weights), "--output_path", str(folder)])
    shutil.copy(weights / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("form", ["yaml", "config", "folder", "file"])
def test_any_form_of_a_model_answers_alike(form, model, folder, expected):
    given = {
        "yaml": model,
        "config": load_config(model),
        "folder": folder,
        "file": str(model.parent / "weights" / "model.safetensors"),
    }[form]
    generate = mixtral_ms.pipeline("text_generation", model=given)
    assert generate(PROMPTS, **GREEDY) == expected
    assert generate(PROMPTS[0], **GREEDY) == expected[:1]


def test_options_of_a_call_do_not_stay(model, expected):
    generate = mixtral_ms.pipeline("text_generation", model=model, batch_size=1)
    sampled = {"do_sample": True, "top_k": 100, "temperature": 2.0, "max_new_tokens": 6}
    first = generate("hello", **sampled, seed=1)
    assert first == generate("hello", **sampled, seed=1)
    assert first != expected[:1]
    assert generate("hello", max_new_tokens=6) == expected[:1]


def test_weights_apart_from_their_configuration(model, tmp_path, expected):
    weights = model.parent / "weights"
    shutil.copy(weights / "model.safetensors", tmp_path / "w.safetensors")
    generate = mixtral_ms.pipeline(
        "text_generation",
        model=model,
        load_checkpoint=tmp_path / "w.safetensors",
        vocab_file=weights / "tokenizer.model",
        weight_dtype="float16",
    )
    (answer,) = generate("hello", max_new_tokens=1)
    assert answer["text_generation_text"][0].startswith("hello")
    with pytest.raises(UserError, match="give the run's YAML as model"):
        mixtral_ms.pipeline("text_generation", model=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("prompts", "options", "part"),
    [
        ("x", {"topk": 3}, "'topk' is no generation parameter"),
        ("x", {"top_p": 0}, "top_p 0"),
        (["x", "word " * 80], {}, "prompt 2 of 2: the prompt has"),
        ([3], {}, "prompt 3: must be a text"),
        (b"abc", {}, "inputs b'abc': must be a text"),
        (None, {}, "inputs None: must be a text"),
        ({"prompt": "x"}, {}, "inputs {'prompt': 'x'}: must be a text"),
        ("x", {"num_beams": 2, "do_sample": True}, "num_beams 2 does not go with do_sample True"),
    ],
)
def test_wrong_calls_are_named(model, prompts, options, part):
    generate = mixtral_ms.pipeline("text_generation", model=model)
    with pytest.raises(UserError) as caught:
        generate(prompts, **options)
    assert part in str(caught.value)


def test_beams_do_not_meet_a_default_that_nobody_gave(model, capsys):
    settings = ["model.model_config.do_sample=True"]
    generate = mixtral_ms.pipeline("text_generation", model=load_config(model, settings))
    beams = {"num_beams": 2, "max_new_tokens": 3}
    assert generate("hello", **beams) == generate("hello", do_sample=False, **beams)
    assert "num_beams: the configuration's do_sample True is left out" in capsys.readouterr().err


def test_a_longer_context_than_is_usual(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 32768, "sliding_window": None})
    )
    prompt = "word " * 5000
    usual = mixtral_ms.pipeline("text_generation", tmp_path)
    assert "may have 4096 tokens together, of the network's 32768" in capsys.readouterr().err
    with pytest.raises(UserError, match="raise seq_length .the network takes 32768."):
        usual(prompt, max_new_tokens=1)
    longer = mixtral_ms.pipeline("text_generation", tmp_path, seq_length=9001)
    assert longer.model.network.num_blocks * longer.model.network.block_size >= 9001
    (answer,) = longer(prompt, max_new_tokens=1, do_sample=False)
    assert answer["text_generation_text"][0].startswith(prompt)


@pytest.mark.parametrize(
    ("task", "name", "options", "part"),
    [
        ("translation", "predict.yaml", {}, "there is only 'text_generation'"),
        ("text_generation", "nowhere", {}, "nowhere does not exist"),
        ("text_generation", "predict.yaml", {"weight_dtype": "int4"}, "weight_dtype 'int4'"),
        ("text_generation", "predict.yaml", {"batch_size": 0}, "predict_batch_size is 0"),
        ("text_generation", "predict.yaml", {"vocab_file": "none"}, "tokenizer model none"),
        ("text_generation", "predict.yaml", {"seq_length": 0}, "seq_length 0: must be a whole"),
        ("text_generation", "predict.yaml", {"seq_length": "9"}, "seq_length '9': must be"),
    ],
)
def test_wrong_models_are_named(model, task, name, options, part):
    with pytest.raises(UserError) as caught:
        mixtral_ms.pipeline(task, model.parent / name, **options)
    assert part in str(caught.value)
