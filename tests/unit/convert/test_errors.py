"""What is wrong with an input or output is found before anything is written, and named."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers.convert_oracle import HIDDEN, WIDTH, write_source

from mixtral_ms.convert.formats.found_weights import Flags, find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found, verify_release
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "in", "hf")
    return tmp_path / "in"


def change(folder, function):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    function(tensors)
    safetensors.numpy.save_file(tensors, path)


def change_config(folder, function):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    function(config)
    path.write_text(json.dumps(config))


def refusal(source, output=None, to="ours", **options):
    output = output or source.parent / "out"
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare(ConvertOptions(source, output, to, **options))
    assert sorted(source.parent.rglob("*")) == before
    return str(caught.value)


def test_a_missing_tensor(source):
    change(source, lambda tensors: tensors.pop(EXPERT))
    assert f"{EXPERT} is missing" in refusal(source)


def test_a_missing_layer(source):
    def drop(tensors):
        for name in [one for one in tensors if one.startswith("model.layers.1.")]:
            del tensors[name]

    change(source, drop)
    text = refusal(source)
    assert "num_hidden_layers is 2" in text
    assert "it is 1" in text


def test_a_surplus_tensor(source):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}
    change(source, lambda tensors: tensors.update(extra))
    assert "q_norm.weight is no weight of Mixtral's" in refusal(source)


def test_an_expert_too_many(source):
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    change(source, lambda tensors: tensors.update({name: tensors[EXPERT]}))
    assert f"{name} is no weight" in refusal(source)


def test_a_wrong_shape(source):
    change(source, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1]}))
    text = refusal(source)
    assert f"{EXPERT} has shape ({WIDTH - 1}, {HIDDEN}), expected is ({WIDTH}, {HIDDEN})" in text


def test_a_wrong_dtype(source):
    change(source, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.int32)}))
    assert f"{EXPERT} has dtype int32" in refusal(source)


def test_dtypes_that_would_become_one_tensor(source):
    change(source, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.float16)}))
    assert "--dtype" in refusal(source)
    prepare(ConvertOptions(source, source.parent / "out", "ours", dtype="float32"))


def test_only_ten_problems_are_named(source):
    def drop(tensors):
        for name in [one for one in tensors if "experts" in one and "0.w2" not in one]:
            del tensors[name]

    change(source, drop)
    text = refusal(source)
    assert text.count("is missing") == 10
    assert "and 6 more" in text


def test_other_tensors_than_mixtrals(source):
    tensors = {"transformer.h.0.attn.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    assert "transformer.h.0.attn.weight" in refusal(source)


def test_no_rope_theta(source):
    change_config(source, lambda config: config.pop("rope_theta"))
    text = refusal(source)
    assert "config.json: lacks the key rope_theta" in text
    assert "--config" in text


@pytest.mark.parametrize(
    "key, value, tensor",
    [
        ("vocab_size", 21, "model.embed_tokens.weight of shape (20, 12) it is 20"),
        ("hidden_size", 16, "model.embed_tokens.weight of shape (20, 12) it is 12"),
        ("intermediate_size", 11, "experts.0.w2.weight of shape (12, 10) it is 10"),
        ("num_hidden_layers", 3, "it is 2"),
        ("num_attention_heads", 8, "q_proj.weight of shape (24, 12) it is 24"),
        ("num_key_value_heads", 1, "k_proj.weight of shape (12, 12) it is 12"),
        ("head_dim", 8, "q_proj.weight of shape (24, 12) it is 24"),
        ("num_local_experts", 8, "gate.weight of shape (3, 12) it is 3"),
    ],
)
def test_a_size_that_contradicts_the_tensors(source, key, value, tensor):
    change_config(source, lambda config: config.update({key: value}))
    text = refusal(source)
    assert "config.json: " in text
    assert key in text
    assert tensor in text


@pytest.mark.parametrize(
    "change_to, expected",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "12"}, "hidden_size is '12'; it must be a whole number"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; it must be a number"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"tie_word_embeddings": True}, "the tensors hold a head of their own"),
        ({"eos_token_id": []}, "eos_token_id is []"),
    ],
)
def test_a_configuration_of_another_network(source, change_to, expected):
    change_config(source, lambda config: config.update(change_to))
    assert expected in refusal(source)


def test_no_configuration(source):
    (source / "config.json").unlink()
    assert "there is no config.json" in refusal(source)
    (source / "config.json").write_text("{")
    assert "not JSON" in refusal(source)


def test_no_configuration_with_mindspore_weights(tmp_path):
    write_source(tmp_path / "in", "ours")
    (tmp_path / "in" / "config.json").unlink()
    text = refusal(tmp_path / "in", to="hf")
    for needed in ("--config", "rope_theta", "num_attention_heads", '"num_local_experts": 3'):
        assert needed in text
    prepare(ConvertOptions(tmp_path / "in", tmp_path / "out", "gmm"))


def test_experts_that_could_be_either(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.convert_oracle.WIDTH", HIDDEN)
    write_source(tmp_path / "in", "ours", intermediate_size=HIDDEN)
    assert "--input_format" in refusal(tmp_path / "in", to="hf")
    options = ConvertOptions(tmp_path / "in", tmp_path / "out", "hf", input_format="gmm")
    assert prepare(options).plan.source_format.name == "gmm"


def test_a_format_that_it_is_not(source):
    assert "said to be in format ours, its names are hf's" in refusal(source, input_format="ours")


def test_existing_output_is_kept(source):
    output = source.parent / "out.ckpt"
    output.write_bytes(b"precious")
    text = refusal(source, output)
    assert "--overwrite" in text
    assert output.read_bytes() == b"precious"
    convert(prepare(ConvertOptions(source, output, "ours", overwrite=True)))
    assert output.stat().st_size > 1000


def test_overwrite_replaces_only_what_a_conversion_made(source):
    output = source.parent / "out"
    convert(prepare(ConvertOptions(source, output, "hf", max_shard_bytes=3000)))
    (output / "notes.txt").write_text("mine")
    assert "notes.txt, which --overwrite would delete" in refusal(
        source, output, "hf", overwrite=True
    )
    (output / "notes.txt").unlink()
    convert(prepare(ConvertOptions(source, output, "ours", overwrite=True)))
    assert not (output / "config.json").exists()
    assert (output / "rank_0").is_dir()


def test_an_empty_folder_is_filled(source):
    output = source.parent / "out"
    output.mkdir()
    convert(prepare(ConvertOptions(source, output, "hf")))
    assert (output / "config.json").is_file()


@pytest.mark.parametrize("output", ["in", "in/sub", ".", "in/model.safetensors"])
def test_output_over_the_input(source, output):
    text = refusal(source, (source.parent / output), "ours", overwrite=True)
    assert "overlaps with the input" in text


@pytest.mark.parametrize(
    "output, to, expected",
    [
        ("out.ckpt", "hf", "Hugging Face's format is a folder"),
        ("out.bin", "ours", "weights for MindSpore are"),
    ],
)
def test_outputs_that_cannot_be(source, output, to, expected):
    assert expected in refusal(source, source.parent / output, to)


def test_inputs_that_are_none(tmp_path):
    def opened(name, strategy=None):
        return open_found(find_weights(tmp_path / name, Flags("--x", "--strategy_dir"), strategy))

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--x: .*nowhere does not exist"):
        opened("nowhere")
    with pytest.raises(UserError, match="--x: .*empty holds no weights"):
        opened("empty")
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match=r"name one of a\.ckpt, b\.ckpt"):
        opened("empty")
    for rank in range(2):
        (tmp_path / "ranks" / f"rank_{rank}").mkdir(parents=True)
        (tmp_path / "ranks" / f"rank_{rank}" / "a.ckpt").touch()
    with pytest.raises(UserError, match="--x: .*ranks holds 2 ranks: give --strategy_dir"):
        opened("ranks")
    with pytest.raises(UserError, match="--strategy_dir: .*nowhere does not exist"):
        opened("ranks", tmp_path / "nowhere")


def test_a_shard_that_was_not_downloaded(source):
    parts = source.parent / "parts"
    convert(prepare(ConvertOptions(source, parts, "hf", max_shard_bytes=3000)))
    lost = sorted(parts.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"lacks {lost.name}" in refusal(parts, source.parent / "again")


def test_verify_release(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither consolidated.00.pth nor"):
        verify_release(tmp_path)
    for part, text in enumerate((b"a", b"", b"bc")):
        (tmp_path / f"consolidated.00.pth-split{part}").write_bytes(text)
    (tmp_path / "tokenizer.model").write_bytes(b"abc")
    with pytest.raises(UserError, match="has MD5 900150983cd24fb0d6963f7d28e17f72, published is"):
        verify_release(tmp_path)
    monkeypatch.setattr(
        "mixtral_ms.convert.formats.open_weight_files._RELEASE_MD5",
        dict.fromkeys(
            ("consolidated.00.pth", "tokenizer.model"), "900150983cd24fb0d6963f7d28e17f72"
        ),
    )
    assert len(verify_release(tmp_path)) == 2
