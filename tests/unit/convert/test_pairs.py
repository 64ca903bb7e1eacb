"""Every format to every other, against weights laid out by hand."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers.convert_oracle import (
    HIDDEN,
    LAYERS,
    MAKERS,
    WIDTH,
    assert_same,
    huggingface,
    tensors_in,
    write_source,
)

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.convert.formats.detect_format import measure, measured_config
from mixtral_ms.convert.formats.tensor_layouts import layout_of
from mixtral_ms.convert.formats.weight_names import FORMATS, WRITABLE
from mixtral_ms.convert.job import execute as execute_module
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError

PIECES = {"whole": 1 << 24, "tiny": 4 * 30}


def run(source, output, to, **options):
    return convert(prepare(ConvertOptions(source, output, to, **options)))


def test_the_oracle_knows_every_format():
    assert MAKERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("experts", [3, 8])
@pytest.mark.parametrize("target", WRITABLE)
@pytest.mark.parametrize("source", FORMATS)
def test_pairs(tmp_path, monkeypatch, source, target, experts, pieces):
    monkeypatch.setattr(execute_module, "CONVERT_PIECE_BYTES", PIECES[pieces])
    weights = write_source(tmp_path / "in", source, experts)
    summary = run(tmp_path / "in", tmp_path / "out", target, max_shard_bytes=5000)
    assert_same(tensors_in(tmp_path / "out"), MAKERS[target](weights))
    files = summary.outcome.files
    assert (len(files) > 1) == (target == "hf")


def test_no_copies_where_the_layout_is_the_same(tmp_path):
    write_source(tmp_path / "in", "hf")
    plan = prepare(ConvertOptions(tmp_path / "in", tmp_path / "out", "ours")).plan
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    piece = plan.source.read(name)
    assert not piece.flags.owndata


@pytest.mark.parametrize("file", ["mixtral.ckpt", "mixtral.safetensors"])
def test_files_name_their_format_where_shapes_do_not(tmp_path, file, monkeypatch):
    monkeypatch.setattr("helpers.convert_oracle.WIDTH", HIDDEN)
    weights = write_source(tmp_path / "in", "hf", intermediate_size=HIDDEN)
    run(tmp_path / "in", tmp_path / "gmm" / file, "gmm")
    run(tmp_path / "gmm" / file, tmp_path / "hf", "hf")
    assert_same(tensors_in(tmp_path / "hf"), weights)


def test_several_experts_dtypes_and_their_casts(tmp_path):
    write_source(tmp_path / "in", "hf")
    assert WIDTH != HIDDEN
    run(tmp_path / "in", tmp_path / "out", "ours", dtype="float16")
    half = {name: value.astype(np.float16) for name, value in huggingface(3).items()}
    assert_same(tensors_in(tmp_path / "out"), MAKERS["ours"](half))


def test_values_that_float16_cannot_hold_are_counted(tmp_path):
    weights = write_source(tmp_path / "in", "hf")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    weights[name].flat[:5] = [1e5, -7e4, 65519, 1e-9, 0]
    safetensors.numpy.save_file(weights, tmp_path / "in" / "model.safetensors")
    outcome = run(tmp_path / "in", tmp_path / "out.safetensors", "gmm", dtype="float16").outcome
    assert outcome.losses == {"model.layers.0.feed_forward.routed_experts.ffn.w2.weight": (2, 1)}


def test_optimizer_state_is_left_out_and_named(tmp_path):
    weights = write_source(tmp_path / "in", "ours")
    path = tmp_path / "in" / "model.safetensors"
    ours = safetensors.numpy.load_file(path)
    moments = {f"adam_m.{name}": value for name, value in ours.items()}
    moments["global_step"] = np.array([7], np.int32)
    safetensors.numpy.save_file(ours | moments, path)
    prepared = prepare(ConvertOptions(tmp_path / "in", tmp_path / "out", "hf"))
    assert set(prepared.plan.left_out) == set(moments)
    convert(prepared)
    assert_same(tensors_in(tmp_path / "out"), weights)


def test_the_record_holds_hashes_and_the_configuration(tmp_path):
    write_source(tmp_path / "in", "hf")
    run(tmp_path / "in", tmp_path / "mixtral.ckpt", "ours")
    record = json.loads((tmp_path / "mixtral.ckpt.json").read_text())
    assert record["weights_format"] == "ours"
    assert record["model_config"]["num_layers"] == LAYERS
    assert record["model_config"]["theta"] == 1e6
    source = open_tensors(tmp_path / "mixtral.ckpt")
    hashes = record["files"]["mixtral.ckpt"]["tensors"]
    assert hashes.keys() == source.infos.keys()


def test_nothing_hidden_is_left(tmp_path):
    write_source(tmp_path / "in", "hf")
    run(tmp_path / "in", tmp_path / "a.ckpt", "ours")
    run(tmp_path / "in", tmp_path / "b", "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.json", "b", "in"]


def change(folder, function):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    function(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_a_head_that_is_the_embedding(tmp_path):
    weights = write_source(tmp_path / "in", "hf", tie_word_embeddings=True)
    change(tmp_path / "in", lambda tensors: tensors.pop("lm_head.weight"))
    run(tmp_path / "in", tmp_path / "ours", "ours")
    run(tmp_path / "ours", tmp_path / "back", "hf")
    del weights["lm_head.weight"]
    assert_same(tensors_in(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_biases_go_where_the_format_has_them(tmp_path):
    write_source(tmp_path / "in", "ours")
    (tmp_path / "in" / "config.json").unlink()
    biases = {
        f"model.layers.{layer}.attention.{which}.bias": np.arange(size, dtype=np.float32) + layer
        for layer in range(LAYERS)
        for which, size in (("wq", 24), ("wk", 12), ("wv", 12), ("wo", HIDDEN))
    }
    change(tmp_path / "in", lambda tensors: tensors.update(biases))
    run(tmp_path / "in", tmp_path / "out", "gmm")
    got = tensors_in(tmp_path / "out")
    for name, value in biases.items():
        np.testing.assert_array_equal(got[name], value)
    with pytest.raises(UserError, match=r"hf .* has no place for .*attention\.wq\.bias and 7 more"):
        plan_only(tmp_path / "in", "ours", "hf")


def plan_only(folder, source, target):
    infos = open_tensors(folder / "model.safetensors").infos
    sizes = measure(infos, FORMATS[source], folder)
    config = measured_config(infos, FORMATS[source], sizes)
    return layout_of(FORMATS[target], config)
