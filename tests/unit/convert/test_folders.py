"""Folders of Hugging Face as transformers opens them, and what inspect says of broken ones."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers import convert_oracle as oracle

from mixtral_ms.cli.support.inspection import inspect_checkpoint
from mixtral_ms.convert.formats.found_weights import Kind, find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.job.conversion import ConvertOptions, prepare
from mixtral_ms.errors import UserError

PLAIN = oracle.huggingface(3)
HEAD, EXPERT = "lm_head.weight", "model.layers.1.block_sparse_moe.experts.2.w1.weight"
DEEP = "[" * 100_000
NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def half(which):
    names = sorted(PLAIN)
    middle = len(names) // 2
    return {name: PLAIN[name] for name in (names[:middle], names[middle:])[which]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_config(folder)
    return folder


def write_config(folder, **change):
    (folder / "config.json").write_text(json.dumps(oracle.config_json(3) | change))


def write_shards(folder, weight_map=None):
    for which, name in enumerate(NAMES):
        safetensors.numpy.save_file(half(which), folder / name)
    names = {tensor: NAMES[which] for which in (0, 1) for tensor in half(which)}
    index = {"weight_map": names | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def opened(folder):
    return open_found(find_weights(folder))


def assert_plain(source, **changed):
    expected = PLAIN | changed
    assert source.infos.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(source.read(name), values)


def test_one_file_before_the_index_of_a_former_download(folder):
    safetensors.numpy.save_file(PLAIN, folder / "model.safetensors")
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (folder / name).write_text(json.dumps({"weight_map": {HEAD: "gone.bin"}}))
    assert_plain(opened(folder))


def test_shards_that_no_index_names_are_left_alone(folder):
    write_shards(folder)
    safetensors.numpy.save_file(
        {HEAD: PLAIN[HEAD] + 1}, folder / "model-00001-of-00009.safetensors"
    )
    assert_plain(opened(folder))


def test_the_index_decides_over_a_tensor_in_two_files(folder):
    write_shards(folder, {HEAD: "model-overlay.safetensors"})
    newer = PLAIN[HEAD] + 1
    safetensors.numpy.save_file({HEAD: newer}, folder / "model-overlay.safetensors")
    assert_plain(opened(folder), **{HEAD: newer})


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_in_several_parts_of_a_release(folder, same):
    """Mistral's parts hold the norms once each: equal, or they contradict."""
    norm = "model.norm.weight"
    for which in (0, 1):
        part = {name: torch.from_numpy(value) for name, value in half(which).items()}
        part[norm] = torch.from_numpy(PLAIN[norm]) + (0 if same else which)
        torch.save(part, folder / f"consolidated.0{which}.pt")
    if same:
        assert_plain(opened(folder))
        return
    with pytest.raises(UserError, match=r"'model.norm.weight' is in .*00.pt and, with other"):
        opened(folder)


@pytest.mark.parametrize(
    "weight_map, part",
    [
        ({"a": None}, "weight_map"),
        ({"a": 1}, "weight_map"),
        ({"a": 5.0}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
        ({HEAD: "../plain/model.safetensors"}, "outside of its folder"),
        ({HEAD: "/etc/hostname"}, "outside of its folder"),
        ({HEAD: "x" * 300}, "xxx"),
        ({HEAD: "a\0b"}, "outside of its folder"),
        ({HEAD: "gone.safetensors"}, "lacks gone.safetensors"),
        ({"no.such.tensor": NAMES[0]}, "lacks the tensor 'no.such.tensor'"),
    ],
)
def test_indexes_that_cannot_be(folder, weight_map, part):
    write_shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert part in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("index", ["[1]", "{", "", '{"weight_map": {"a": "b", "a": "c"}}', DEEP])
def test_indexes_that_are_none(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        opened(folder)


def test_shards_without_an_index_are_counted(folder):
    write_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert_plain(opened(folder))
    (folder / NAMES[0]).unlink()
    with pytest.raises(UserError, match=rf"lacks {NAMES[0]}, .*finish the download"):
        opened(folder)
    safetensors.numpy.save_file(half(0), folder / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="sets of 2 and 3 files"):
        opened(folder)


def test_the_root_of_a_cache_names_its_snapshot(tmp_path):
    root = tmp_path / "models--org--name"
    for revision in ("0a", "0b"):
        (root / "snapshots" / revision).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0a\n")
    for path in (root, root / "snapshots"):
        with pytest.raises(UserError, match=rf"cache of Hugging Face's: give {root}/snapshots/0a"):
            opened(path)


@pytest.mark.parametrize("name", ["model.safetensors", "m.safetensors", "m.ckpt"])
def test_weights_with_an_adapter_beside_them_are_weights(folder, name):
    (folder / "adapter_config.json").write_text("{}")
    safetensors.numpy.save_file({"a": np.ones(2)}, folder / "adapter_model.safetensors")
    assert find_weights(folder).kind is Kind.PEFT
    safetensors.numpy.save_file(PLAIN, folder / name)
    assert_plain(opened(folder))


def without(*names):
    return {name: value for name, value in PLAIN.items() if name not in names}


BROKEN = {
    "an expert's weight is missing": (without(EXPERT), {}, f"{EXPERT} is missing"),
    "one layer more": (PLAIN, {"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    "more experts": (PLAIN, {"num_local_experts": 8}, "num_local_experts is 8"),
    "padded rows": (PLAIN, {"vocab_size": 19}, "vocab_size is 19"),
    "a padded head": (
        PLAIN | {HEAD: np.zeros((24, oracle.HIDDEN), np.float32)},
        {},
        f"{HEAD} has shape (24, 12)",
    ),
    "no head": (without(HEAD), {}, "tie_word_embeddings is False"),
    "a surplus tensor": (PLAIN | {"model.extra": np.ones(2)}, {}, "model.extra is no weight"),
    "numbers for weights": (PLAIN | {EXPERT: PLAIN[EXPERT].astype(np.int32)}, {}, "dtype int32"),
    "float64": (PLAIN | {EXPERT: PLAIN[EXPERT].astype(np.float64)}, {}, "dtype float64"),
    "one layer as transformers 5 has it": (
        {name: one for name, one in PLAIN.items() if "layers.0.block" not in name}
        | {name: one for name, one in oracle.fused(PLAIN).items() if "layers.0.mlp" in name},
        {},
        "layers.0",
    ),
    "NaN": (PLAIN | {HEAD: PLAIN[HEAD] * np.float32("nan")}, {}, f"{HEAD} holds values that are"),
    "infinite in 16 bits": (
        PLAIN | {HEAD: np.full_like(PLAIN[HEAD], np.inf, dtype=np.float16)},
        {},
        f"{HEAD} holds values that are",
    ),
    "an impossible configuration": (PLAIN, {"num_experts_per_tok": 9}, "num_experts_per_tok 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inspect_says_what_a_conversion_refuses(folder, case):
    tensors, config, expected = BROKEN[case]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    write_config(folder, **config)
    assert any(expected in one for one in inspect_checkpoint(folder).problems)
    if not expected.startswith(f"{HEAD} holds"):  # values are seen by those who read them
        with pytest.raises(UserError):
            prepare(ConvertOptions(folder, folder.parent / "out", "ours"))


def test_inspect_finds_nothing_in_a_good_one(folder):
    write_shards(folder)
    assert inspect_checkpoint(folder).problems == []
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({name: torch.from_numpy(one) for name, one in PLAIN.items()}, folder / "m.pth")
    assert inspect_checkpoint(folder / "m.pth").problems == []


def test_inspect_finds_a_flipped_value_by_the_sum_of_an_archive(folder):
    path = folder / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(one) for name, one in PLAIN.items()}, path)
    data = bytearray(path.read_bytes())
    data[data.index(PLAIN[HEAD].tobytes()) + 40] ^= 1
    path.write_bytes(data)
    assert any("CRC-32" in one for one in inspect_checkpoint(folder).problems)


def test_a_tensor_named_by_half_a_character_is_refused(folder):
    header = b'{"\\ud83d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (problem,) = inspect_checkpoint(folder).problems
    assert str(path) in problem and "surrogate" in problem
    problem.encode()
