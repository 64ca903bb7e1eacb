"""Opening any file of tensors, and several as one."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mixtral_ms.checkpoint.formats.mindspore_ckpt_format import CkptSource, write_ckpt
from mixtral_ms.checkpoint.formats.open_file import MergedSource, open_tensors
from mixtral_ms.checkpoint.formats.safetensors_format import SafetensorsSource, write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import DamagedFileError, outgoing
from mixtral_ms.checkpoint.formats.torch_format import TorchZipSource
from mixtral_ms.errors import UserError

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSORS = [outgoing("w", ARRAY)]


@pytest.mark.parametrize("name", ["m.safetensors", "m", "m.bin"])
def test_safetensors_by_content(tmp_path, name):
    write_safetensors(tmp_path / name, TENSORS, {})
    source = open_tensors(tmp_path / name)
    assert isinstance(source, SafetensorsSource)
    np.testing.assert_array_equal(source.read("w"), ARRAY)


def test_ckpt_by_suffix(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", TENSORS)
    source = open_tensors(tmp_path / "m.ckpt")
    assert isinstance(source, CkptSource)
    np.testing.assert_array_equal(source.read("w"), ARRAY)


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m"])
def test_pytorch_by_content(tmp_path, name):
    torch.save({"w": torch.from_numpy(ARRAY)}, tmp_path / name)
    source = open_tensors(tmp_path / name)
    assert isinstance(source, TorchZipSource)
    np.testing.assert_array_equal(source.read("w"), ARRAY)


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt is not a file of tensors .*\.ckpt, \.bin"):
        open_tensors(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="gone: no such file"):
        open_tensors(tmp_path / "gone")
    with pytest.raises(UserError, match="a folder, not a file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_garbage_under_a_known_suffix_is_damage(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"garbage, certainly")
    with pytest.raises(DamagedFileError, match=str(path)):
        open_tensors(path)


def test_merged_sources(tmp_path):
    first, second, again = (tmp_path / f"{i}.safetensors" for i in range(3))
    write_safetensors(first, TENSORS, {})
    write_ckpt(second.with_suffix(".ckpt"), [outgoing("v", ARRAY.T)])
    write_safetensors(again, [outgoing("w", ARRAY + 1)], {})
    sources = [open_tensors(path) for path in (first, second.with_suffix(".ckpt"))]
    merged = MergedSource(tmp_path, sources)
    assert (merged.path, list(merged.infos)) == (tmp_path, ["w", "v"])
    np.testing.assert_array_equal(merged.read("v"), ARRAY.T)
    np.testing.assert_array_equal(merged.read("w", (slice(1, 2), slice(0, 2))), ARRAY[1:2, 0:2])
    with pytest.raises(UserError, match=f"'w' is in {first} and, with other values, in {again}"):
        MergedSource(tmp_path, [*sources, open_tensors(again)])


def test_reading_needs_neither_pytorch_nor_mindspore():
    code = (
        "import sys, mixtral_ms.checkpoint.store.store as _; "
        "print('torch' in sys.modules, 'mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
