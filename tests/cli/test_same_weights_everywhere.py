"""Whoever is given a path of weights takes it for the same: training, prediction, inspect, ..."""

import dataclasses
import json
import shutil

import pytest
from helpers.answering import make_model, network

import mixtral_ms
from mixtral_ms import load_config
from mixtral_ms.cli.commands.convert import main as convert
from mixtral_ms.cli.commands.transform import main as transform
from mixtral_ms.cli.support import inspection
from mixtral_ms.convert import run_weights
from mixtral_ms.convert.formats.found_weights import Flags, Kind, find_weights
from mixtral_ms.convert.formats.write_config import to_huggingface
from mixtral_ms.convert.job import conversion
from mixtral_ms.errors import UserError
from mixtral_ms.infer import text_generation_pipeline
from mixtral_ms.infer.load_model import load_model
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train import builders
from mixtral_ms.train.state import resume
from mixtral_ms.train.state.rank_agreement import Storage

FORMS = {
    "hf": Kind.HUGGING_FACE,
    "shards": Kind.HUGGING_FACE,
    "a.ckpt": Kind.FILE,
    "gmm.safetensors": Kind.FILE,
    "run/a": Kind.CHECKPOINT,
    "run": Kind.CHECKPOINT,
    "run/a/rank_0": Kind.FOLDER,
    "lone": Kind.FOLDER,
    "cut": Kind.CHECKPOINT,
    "parts": Kind.RANKS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def forms(model):
    """The model's weights in every form, below one folder, with a tokenizer in or beside each."""
    folder, source = model.parent, model.parent / "weights"
    written = to_huggingface(network(model), {}, "float32")["config.json"]
    (source / "config.json").write_text(json.dumps(written))

    def write(name, *flags):
        convert(["--input_path", str(source), "--output_path", str(folder / name), *flags])

    write("hf", "--reversed")
    write("shards", "--reversed", "--max_shard_size", "1MB")
    write("a.ckpt")
    write("gmm.safetensors", "--to", "gmm")
    write("run/a")
    (folder / "lone").mkdir()
    write("lone/a.ckpt")
    transform(["--src_ckpt_dir", str(folder / "run/a"), "--dst_ckpt_dir", str(folder / "cut"),
               "--dst_strategy", "mp=2,ep=2"])  # fmt: skip
    for part in ("rank_0", "rank_1", "strategy"):
        shutil.copytree(folder / "cut" / part, folder / "parts" / part)
    for place in (".", "run", "run/a"):
        shutil.copy(source / "tokenizer.model", folder / place)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """What every caller was answered."""
    answers = []

    def recording(*arguments, **options):
        found = find_weights(*arguments, **options)
        answers.append(dataclasses.replace(found, flags=Flags()))
        return found

    for module in (run_weights, conversion, inspection, text_generation_pipeline, resume):
        monkeypatch.setattr(module, "find_weights", recording)
    return answers


def start_training(config, path):
    builders.open_network_weights(config)


def fill_network(config, path):
    config.model.model_config.use_past = False
    builders.build_network(builders.without_adapters(config), Mesh())


def predict(config, path):
    load_model(config)


def pipeline(config, path):
    try:
        mixtral_ms.pipeline("text_generation", model=path)
    except UserError as error:  # it names its own way out; what was found is what matters here
        assert "give the run's YAML as model" in str(error)


def inspect(config, path):
    inspection.inspect_checkpoint(path)


def begin_conversion(config, path):
    options = conversion.ConvertOptions(path, path.parent / "never.ckpt", "ours")
    if not find_weights(path).network:
        options = dataclasses.replace(options, config=path.parent / "predict.yaml")
    conversion.prepare(dataclasses.replace(options, overwrite=True))


CALLERS = (start_training, fill_network, predict, pipeline, inspect, begin_conversion)


@pytest.mark.parametrize("form", FORMS)
def test_everybody_sees_the_same(form, model, forms, seen):
    path = forms / form
    for caller in CALLERS:
        before = len(seen)
        caller(load_config(model, [f"load_checkpoint={path}"]), path)
        assert len(seen) > before, f"{caller.__name__} did not ask"
    assert {one.kind for one in seen} == {FORMS[form]}
    assert all(one == seen[0] for one in seen)
    assert seen[0].tokenizer is not None


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_our_own_checkpoints_alone(form, model, forms, seen, tmp_path):
    path = forms / form
    settings = [f"load_checkpoint={path}", "resume_training=True", f"output_dir={tmp_path}"]
    config = load_config(model, settings)
    if FORMS[form] is Kind.CHECKPOINT:
        assert resume.find_resume(config, Mesh(), Storage()).folder == find_weights(path).path
    else:
        text = f"cannot resume .*{form}: it is {FORMS[form].value}, and no checkpoint with opti"
        with pytest.raises(UserError, match=f"{text}.*--resume_training False"):
            resume.find_resume(config, Mesh(), Storage())
    assert [one.kind for one in seen] == [FORMS[form]]
