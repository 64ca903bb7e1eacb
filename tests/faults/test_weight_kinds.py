"""A file that is not the weights it was taken for is called what it is, under every name."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
from helpers import convert_oracle as oracle

from mixtral_ms.cli.support.inspection import inspect_checkpoint
from mixtral_ms.convert.formats.found_weights import Flags, find_weights
from mixtral_ms.convert.job.conversion import ConvertOptions, prepare
from mixtral_ms.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4892809584\n"
NAMES = ("model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "m.ckpt")
CONTENTS = {
    "git-lfs pointer": (LFS, "git-lfs pointer (to 4,892,809,584 bytes), not a file of weights"),
    "nothing": (b"", "is empty (0 bytes)"),
    "web page": (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page"),
    "server's error": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(40), "compressed with zstd"),
    "tar": (b"model".ljust(257, b"\0") + b"ustar" + bytes(200), "a tar archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
    "MindRecord": (
        struct.pack("<Q", 200) + b'{"index_fields":[],"shard_addresses":[]}'.ljust(200),
        "a MindRecord",
    ),
    "Parquet": (b"PAR1" + bytes(40), "a Parquet file"),
    "Megatron's index": (b"MMIDIDX\0\0" + bytes(40), "a Megatron .idx"),
    "zeros": (bytes(4096), "nothing but zeros"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(oracle.config_json(3)))
    return folder


def refusal(folder):
    with pytest.raises(UserError) as caught:
        prepare(ConvertOptions(folder, folder.parent / "out", "ours"))
    assert "damaged" not in str(caught.value)
    text = str(caught.value).removeprefix("--input_path: ")
    inspected = inspect_checkpoint(folder).problems
    assert text in [one.removeprefix("inspect: ") for one in inspected]
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_a_file_is(name, content, folder):
    data, expected = CONTENTS[content]
    (folder / name).write_bytes(data)
    text = refusal(folder)
    assert f"{folder / name} is" in text and expected in text


@pytest.mark.parametrize("content", ["git-lfs pointer", "nothing", "web page"])
def test_what_a_shard_is(content, folder):
    """Of two shards with an index the second did not come."""
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    safetensors.numpy.save_file({"lm_head.weight": np.ones(3)}, folder / shards[0])
    (folder / shards[1]).write_bytes(CONTENTS[content][0])
    names = dict(zip(("lm_head.weight", "model.norm.weight"), shards, strict=True))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert CONTENTS[content][1] in refusal(folder)


def test_a_megatron_data_set_is_no_weights(folder):
    (folder / "pytorch_model.bin").write_bytes(bytes(range(200)))
    (folder / "pytorch_model.idx").write_bytes(b"MMIDIDX\0\0")
    assert "a Megatron data set" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_whose_target_is_gone(name, folder):
    (folder / name).symlink_to("../blobs/0f1e")
    text = refusal(folder)
    assert f"{folder / name}: a symbolic link to ../blobs/0f1e, which does not exist" in text


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("blobs/gone"), "a symbolic link to blobs/gone, which does"),
    ],
)
def test_what_is_named_is_no_file_at_all(folder, make, said):
    """Named itself, and not a folder of it."""
    path = folder / "named.safetensors"
    make(path)
    with pytest.raises(UserError, match=f"--x: {path}: {said}"):
        find_weights(path, Flags("--x"))
    assert any(said in one for one in inspect_checkpoint(path).problems)


def test_a_pipe(folder):
    os.mkfifo(folder / "model.safetensors")
    assert "a named pipe (FIFO), not a file" in refusal(folder)


@pytest.mark.parametrize(
    "tensors, config, expected",
    [
        ({"q_proj.qweight": 0, "q_proj.qzeros": 0, "q_proj.scales": 0}, "gptq", "gptq"),
        ({"q_proj.qweight": 0, "q_proj.qzeros": 0}, "awq", "awq"),
        ({"q_proj.weight.absmax": 0, "q_proj.weight.quant_map": 0}, "bitsandbytes", "bitsandbytes"),
        ({"q_proj.SCB": 0}, "bitsandbytes", "bitsandbytes"),
        ({"q_proj.weight_scale": 0}, "compressed-tensors", "compressed-tensors"),
        ({"q_proj.weight_scale_inv": 0}, "fp8", "fp8"),
        ({"q_proj.qweight": 0}, None, "q_proj.qweight"),
    ],
)
def test_quantised_weights_are_named(tensors, config, expected, folder):
    plain = oracle.huggingface(3)
    del plain["model.layers.0.self_attn.q_proj.weight"]
    at = "model.layers.0.self_attn."
    arrays = {at + name: np.zeros((2, 2), np.int32) for name in tensors}
    safetensors.numpy.save_file(plain | arrays, folder / "model.safetensors")
    if config:
        data = oracle.config_json(3) | {"quantization_config": {"quant_method": config}}
        (folder / "config.json").write_text(json.dumps(data))
    text = refusal(folder)
    assert "these weights are quantised" in text and expected in text
    assert "16 bit" in text


def test_numbers_of_eight_bits_are_named(folder):
    header = {"lm_head.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "F8_E4M3" in refusal(folder) and "quantised" in refusal(folder)


def test_a_leftover_quantization_config_with_plain_weights_is_read(folder):
    safetensors.numpy.save_file(oracle.huggingface(3), folder / "model.safetensors")
    data = oracle.config_json(3) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(data))
    prepare(ConvertOptions(folder, folder.parent / "out", "ours"))
    assert not inspect_checkpoint(folder).problems
