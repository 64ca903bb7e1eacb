"""What a path of weights means: every kind that docs/checkpoints.md names, and the odd ones."""

import json
import shutil

import numpy as np
import pytest
from helpers import convert_oracle as oracle
from helpers.sharded import whole_tensors

from mixtral_ms.checkpoint.store.store import save_checkpoint
from mixtral_ms.convert.formats.found_weights import Flags, Kind, find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError

STATE = {"step": 1}
CHECKPOINT = {"state.json": STATE, "manifest.json": {}, "rank_0/model.safetensors": ""}


def checkpoint_in(*folders):
    """Files of a checkpoint of ours in each folder, the later ones of later steps."""
    return {
        f"{folder}/{name}": {"step": step} if name == "state.json" else content
        for step, folder in enumerate(folders, 1)
        for name, content in CHECKPOINT.items()
    }


# What lies there -> what was named, and every field that is not as by default. {files} are below
# the test's folder.
CASES = {
    "Hugging Face, one file": (
        {"hf/model.safetensors": "", "hf/config.json": {}, "hf/tokenizer.model": ""},
        "hf",
        {
            "kind": Kind.HUGGING_FACE,
            "files": ("hf/model.safetensors",),
            "config_files": ("hf/config.json",),
            "tokenizer": "hf/tokenizer.model",
        },
    ),
    "Hugging Face, shards with an index": (
        {
            "hf/model-00001-of-00002.safetensors": "",
            "hf/model-00002-of-00002.safetensors": "",
            "hf/model.safetensors.index.json": {},
            "tokenizer.model": "",
        },
        "hf",
        {
            "kind": Kind.HUGGING_FACE,
            "index": "hf/model.safetensors.index.json",
            "tokenizer": "tokenizer.model",
        },
    ),
    "Hugging Face, shards alone": (
        {"hf/model-00001-of-00002.safetensors": "", "hf/model-00002-of-00002.safetensors": ""},
        "hf",
        {
            "kind": Kind.HUGGING_FACE,
            "files": ("hf/model-00001-of-00002.safetensors", "hf/model-00002-of-00002.safetensors"),
        },
    ),
    "Hugging Face, .bin": (
        {"hf/pytorch_model.bin": "", "hf/training_args.bin": ""},
        "hf",
        {"kind": Kind.HUGGING_FACE, "files": ("hf/pytorch_model.bin",)},
    ),
    "Hugging Face, .bin in shards": (
        {"hf/pytorch_model.bin.index.json": {}, "hf/pytorch_model-00001-of-00002.bin": ""},
        "hf",
        {"kind": Kind.HUGGING_FACE, "index": "hf/pytorch_model.bin.index.json"},
    ),
    "Hugging Face, converted by us": (
        {"hf/model.safetensors": "", "hf/config.json": {}, "hf/conversion.json": {}},
        "hf",
        {
            "kind": Kind.HUGGING_FACE,
            "files": ("hf/model.safetensors",),
            "config_files": ("hf/config.json",),
            "record": "hf/conversion.json",
            "hashes": "hf/conversion.json",
        },
    ),
    "Mistral's release": (
        {"r/consolidated.00.pth": "", "r/params.json": {}, "r/tokenizer.model": ""},
        "r",
        {
            "kind": Kind.RELEASE,
            "files": ("r/consolidated.00.pth",),
            "config_files": ("r/params.json",),
            "tokenizer": "r/tokenizer.model",
        },
    ),
    "Mistral's release in parts": (
        {"r/consolidated.00.pth-split0": "", "r/consolidated.00.pth-split1": ""},
        "r",
        {"kind": Kind.RELEASE, "files": ("r/consolidated.00.pth-split0",)},
    ),
    "MindSpore, a file": (
        {"m.ckpt": "", "tokenizer.model": ""},
        "m.ckpt",
        {"kind": Kind.FILE, "files": ("m.ckpt",), "tokenizer": "tokenizer.model"},
    ),
    "MindSpore, a file that we converted": (
        {"m.ckpt": "", "m.ckpt.json": {"weights_format": "gmm"}, "config.json": {}},
        "m.ckpt",
        {
            "kind": Kind.FILE,
            "files": ("m.ckpt",),
            "config_files": ("m.ckpt.json", "config.json"),
            "record": "m.ckpt.json",
            "hashes": "m.ckpt.json",
        },
    ),
    "MindSpore, a folder of .safetensors": (
        {"m/b.safetensors": "", "m/a.safetensors": "", "m/.hidden.safetensors": ""},
        "m",
        {"kind": Kind.FOLDER, "files": ("m/a.safetensors", "m/b.safetensors")},
    ),
    "MindSpore, a folder of a .ckpt": (
        {"m/a.ckpt": ""},
        "m",
        {"kind": Kind.FOLDER, "files": ("m/a.ckpt",)},
    ),
    "our checkpoint": (
        checkpoint_in("c"),
        "c",
        {
            "kind": Kind.CHECKPOINT,
            "config_files": ("c/state.json",),
            "record": "c/state.json",
            "hashes": "c/manifest.json",
        },
    ),
    "our checkpoints, as latest says": (
        checkpoint_in("run/a", "run/b", "run/c") | {"run/latest": "b", "tokenizer.model": ""},
        "run",
        {
            "path": "run/b",
            "kind": Kind.CHECKPOINT,
            "config_files": ("run/b/state.json",),
            "record": "run/b/state.json",
            "hashes": "run/b/manifest.json",
            "tokenizer": "tokenizer.model",
        },
    ),
    "our checkpoints, the tokenizer in the one": (
        checkpoint_in("run/a") | {"run/a/tokenizer.model": "", "run/tokenizer.model": ""},
        "run",
        {
            "path": "run/a",
            "kind": Kind.CHECKPOINT,
            "config_files": ("run/a/state.json",),
            "record": "run/a/state.json",
            "hashes": "run/a/manifest.json",
            "tokenizer": "run/a/tokenizer.model",
        },
    ),
    "our checkpoint, cut": (
        checkpoint_in("c") | {"c/rank_1/model.safetensors": "", "c/strategy/a.ckpt": ""},
        "c",
        {
            "kind": Kind.CHECKPOINT,
            "strategy": "c/strategy",
            "config_files": ("c/state.json",),
            "record": "c/state.json",
            "hashes": "c/manifest.json",
        },
    ),
    "our checkpoint, its ranks gone": (
        {"c/manifest.json": {}, "c/state.json": STATE},
        "c",
        {
            "kind": Kind.CHECKPOINT,
            "config_files": ("c/state.json",),
            "record": "c/state.json",
            "hashes": "c/manifest.json",
        },
    ),
    "one rank of our checkpoint": (
        checkpoint_in("c"),
        "c/rank_0",
        {
            "kind": Kind.FOLDER,
            "files": ("c/rank_0/model.safetensors",),
            "config_files": ("c/state.json",),
            "record": "c/state.json",
            "hashes": "c/manifest.json",
        },
    ),
    "one file of our checkpoint": (
        checkpoint_in("c"),
        "c/rank_0/model.safetensors",
        {
            "kind": Kind.FILE,
            "files": ("c/rank_0/model.safetensors",),
            "config_files": ("c/state.json",),
            "record": "c/state.json",
            "hashes": "c/manifest.json",
        },
    ),
    "folders of ranks": (
        {"cut/rank_0/a-1_2.ckpt": "", "cut/rank_1/a-1_2.ckpt": ""},
        "cut",
        {"kind": Kind.RANKS},
    ),
    "folders of ranks with their strategy": (
        {"cut/rank_0/a.ckpt": "", "cut/rank_1/a.ckpt": "", "cut/strategy/s.ckpt": ""},
        "cut",
        {"kind": Kind.RANKS, "strategy": "cut/strategy"},
    ),
    "a LoRA run's checkpoints": (
        {
            "run/a/state.json": STATE,
            "run/a/manifest.json": {},
            "run/a/rank_0/adapter.safetensors": "",
        },
        "run",
        {
            "path": "run/a",
            "kind": Kind.LORA,
            "config_files": ("run/a/state.json",),
            "record": "run/a/state.json",
            "hashes": "run/a/manifest.json",
        },
    ),
    "a LoRA run's checkpoint, transformed": (
        {"a/state.json": STATE, "a/rank_0/adapter.ckpt": ""},
        "a",
        {"kind": Kind.LORA, "config_files": ("a/state.json",), "record": "a/state.json"},
    ),
    "PEFT's format": (
        {"p/adapter_config.json": {}, "p/adapter_model.safetensors": ""},
        "p",
        {"kind": Kind.PEFT},
    ),
    "weights with an adapter's file beside them": (
        {"p/adapter_config.json": {}, "p/model.safetensors": ""},
        "p",
        {"kind": Kind.HUGGING_FACE, "files": ("p/model.safetensors",)},
    ),
    "nothing": ({"e/readme.txt": ""}, "e", {"kind": Kind.NOTHING}),
}
PATHS = ("path", "index", "strategy", "record", "hashes", "tokenizer")


@pytest.fixture
def place(tmp_path):
    """Writes files into an empty folder; returns it."""

    def write(files):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize("case", CASES)
def test_every_kind(case, place):
    files, named, expected = CASES[case]
    folder = place(files)
    found = find_weights(folder / named)
    wanted = {"path": named, "files": (), "config_files": ()} | dict.fromkeys(PATHS[1:]) | expected
    for field in PATHS:
        wanted[field] = wanted[field] and folder / wanted[field]
    for field in ("files", "config_files"):
        wanted[field] = tuple(folder / one for one in wanted[field])
    assert {field: getattr(found, field) for field in wanted} == wanted
    assert (found.named, found.flags) == (folder / named, Flags())


def test_every_kind_is_in_the_table():
    assert {expected["kind"] for _, _, expected in CASES.values()} == set(Kind)


def test_a_strategy_that_the_user_names_is_taken(place):
    folder = place(CASES["folders of ranks with their strategy"][0])
    other = folder / "cut/rank_0"
    assert find_weights(folder / "cut", strategy=other).strategy == other


@pytest.mark.parametrize("to, output", [("ours", "a.ckpt"), ("gmm", "a"), ("hf", "a")])
def test_what_we_write_says_its_network_and_format(tmp_path, to, output):
    oracle.write_source(tmp_path / "source", "native")
    given = find_weights(tmp_path / "source")
    assert given.format_name is None and given.hash_problems() is None
    convert(prepare(ConvertOptions(tmp_path / "source", tmp_path / output, to)))
    found = find_weights(tmp_path / output)
    assert found.format_name == to
    assert found.network.config.vocab_size == oracle.VOCABULARY
    assert found.network.config.theta == given.network.config.theta == 1e6
    assert found.hash_problems() == found.hash_problems(read_all=False) == []
    (file,) = tmp_path.glob("a.ckpt") if to == "ours" else (tmp_path / "a").rglob("model*.saf*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len(find_weights(tmp_path / output).hash_problems()) == 1
    assert find_weights(tmp_path / output).hash_problems(read_all=False) == []


def test_a_record_without_a_network_is_passed_over(tmp_path):
    oracle.write_source(tmp_path / "source", "ours")
    (tmp_path / "source/config.json").unlink()
    lone = tmp_path / "lone" / "a.ckpt"
    lone.parent.mkdir()
    convert(prepare(ConvertOptions(tmp_path / "source", lone, "gmm")))
    assert find_weights(lone).network is None
    convert(prepare(ConvertOptions(lone, tmp_path / "back.ckpt", "ours")))
    (lone.parent / "config.json").write_text(json.dumps(oracle.config_json(3)))
    assert find_weights(lone).network.config.vocab_size == oracle.VOCABULARY


def test_a_run_s_checkpoints_are_read_as_the_one_that_is_meant(tmp_path):
    """Experts as wide as the network: only the record tells which of two formats they are in."""
    square = oracle.huggingface(3)
    for name in [name for name in square if ".experts." in name]:
        square[name] = np.resize(square[name], (oracle.HIDDEN, oracle.HIDDEN))
    oracle.write_source(tmp_path / "hf", "hf", intermediate_size=oracle.HIDDEN)
    oracle.safetensors.numpy.save_file(square, tmp_path / "hf/model.safetensors")
    convert(prepare(ConvertOptions(tmp_path / "hf", tmp_path / "run/a", "gmm")))
    config = find_weights(tmp_path / "run").network.config
    one, several = (open_weights(find_weights(tmp_path / at), config) for at in ("hf", "run"))
    for name in one.infos:
        np.testing.assert_array_equal(one.read(name), several.read(name))


def test_ranks_that_are_gone_are_damage(tmp_path):
    arrays = {name: array for name, (array, _) in whole_tensors(moments=False).items()}
    path = save_checkpoint(tmp_path, "m-step_0000001", {"model": arrays}, STATE)
    good = save_checkpoint(tmp_path, "m-step_0000002", {"model": arrays}, {"step": 2})
    shutil.rmtree(path / "rank_0")
    with pytest.raises(UserError, match=r"rank_0/model\.safetensors is missing.*" + good.name):
        open_found(find_weights(path))


def test_a_checkpoint_that_a_kill_left_aside_is_found(tmp_path):
    path = save_checkpoint(tmp_path, "m", {"model": {"w": np.ones(2, np.float32)}}, STATE)
    path.rename(tmp_path / ".m.old-01234567")
    assert find_weights(tmp_path).path == path


def test_latest_that_is_gone_is_named(place):
    folder = place(checkpoint_in("run/a") | {"run/latest": "b"})
    with pytest.raises(UserError, match=r"holds no checkpoint 'b'; it holds a"):
        find_weights(folder / "run")
