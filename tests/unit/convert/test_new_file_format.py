"""A format of files that is unknown to the product is one row: everything reads and writes it."""

import hashlib
import json
import os

import pytest
from helpers import convert_oracle as oracle
from helpers.sharded import contents, folder_hashes, write_whole

from mixtral_ms.checkpoint.formats import file_formats
from mixtral_ms.checkpoint.formats.file_formats import FILE_FORMATS, FileFormat
from mixtral_ms.checkpoint.formats.mapped_file import MappedFile
from mixtral_ms.checkpoint.formats.mapped_source import FramedSource
from mixtral_ms.checkpoint.formats.tensor_source import TensorInfo
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry, TensorWriter
from mixtral_ms.cli.commands.convert import main as convert
from mixtral_ms.cli.commands.inspect import main as inspect
from mixtral_ms.cli.commands.transform import main as transform
from mixtral_ms.errors import UserError

MARK = b"TOYS"


def write_toy(path, tensors, framework, on_bytes):
    """A line of JSON with names, shapes and dtypes, then the values."""
    header = [[one.name, list(one.info.shape), one.info.dtype] for one in tensors]
    text = MARK + json.dumps([framework, header]).encode() + b"\n"
    entries = {}
    with open(path, "wb") as file:
        file.write(text)
        for tensor in tensors:
            writer = TensorWriter(file, tensor, on_bytes)
            writer.write(tensor.info.nbytes)
            entries[tensor.name] = writer.finish()
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, len(text), hashlib.sha256(text).hexdigest(), entries)


def read_toy(path):
    with open(path, "rb") as file:
        text = file.readline()
    at, tensors = len(text), {}
    for name, shape, dtype in json.loads(text[len(MARK) :])[1]:
        info = TensorInfo(tuple(shape), dtype)
        tensors[name] = (info, [(at, at + info.nbytes)])
        at += info.nbytes
    return FramedSource(path, MappedFile(path), tensors)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    row = FileFormat(
        "toy",
        (".toy",),
        read_toy,
        write_toy,
        starts=lambda start: start.startswith(MARK),
        dtypes=("float32", "int32"),
        loading="toys.load({file!r})",
    )
    monkeypatch.setitem(FILE_FORMATS, "toy", row)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: records name their input, so its path must be the same."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_convert_writes_it_and_reads_it_back(folder, capsys):
    oracle.write_source(folder / "hf", "hf")
    for name in ("straight.toy", "straight.ckpt"):
        convert(["--input_path", "hf", "--output_path", name])
    assert "toys.load('straight.toy')" in capsys.readouterr().out
    assert (folder / "straight.toy").read_bytes().startswith(MARK)
    assert contents(folder / "straight.toy") == contents(folder / "straight.ckpt")
    for name in ("toy", "ckpt"):
        convert(["--reversed", "--input_path", f"straight.{name}", "--output_path", f"hf_{name}"])
    first, second = (folder_hashes(folder / f"hf_{name}") for name in ("toy", "ckpt"))
    record = "conversion.json"  # alone says what the folder was converted from
    assert first.pop(record) != second.pop(record)
    assert first == second


def test_alone_in_a_folder_it_is_found_and_two_are_not_one_network(folder):
    oracle.write_source(folder / "hf", "hf")
    (folder / "lone").mkdir()
    convert(["--input_path", "hf", "--output_path", "lone/a.toy"])
    convert(["--input_path", "lone", "--output_path", "again.toy", "--to", "gmm"])
    (folder / "lone/b.toy").write_bytes((folder / "lone/a.toy").read_bytes())
    with pytest.raises(UserError, match=r"name one of a\.toy, b\.toy"):
        convert(["--input_path", "lone", "--output_path", "other.toy", "--to", "gmm"])


def test_transform_cuts_into_it_and_merges_it(folder):
    whole = write_whole(folder / "whole.safetensors")
    cut = ["--src_ckpt_dir", str(whole), "--dst_strategy", "mp=2,ep=2", "--format", "toy"]
    transform([*cut, "--dst_ckpt_dir", "cut"])
    assert sorted(one.name for one in (folder / "cut").glob("*/*.toy")) == [
        "checkpoint_0.toy",
        "checkpoint_1.toy",
    ]
    transform(["--src_ckpt_dir", "cut", "--dst_ckpt_dir", "merged"])
    assert contents(folder / "merged/rank_0/checkpoint_0.toy") == contents(whole)


def test_its_hashes_are_compared(folder, capsys):
    oracle.write_source(folder / "hf", "hf")
    convert(["--input_path", "hf", "--output_path", "a.toy"])
    assert inspect(["a.toy"]) == 0
    assert "format:     toy, names: ours" in capsys.readouterr().out
    data = bytearray((folder / "a.toy").read_bytes())
    data[-1] ^= 1
    (folder / "a.toy").write_bytes(data)
    assert inspect(["a.toy"]) == 1
    assert "was changed: its hash is not the manifest's" in capsys.readouterr().out


def test_what_it_cannot_hold_is_refused_before_anything_is_written(folder):
    oracle.write_source(folder / "hf", "hf")
    with pytest.raises(UserError, match=r"is bfloat16, and \.toy files hold float32, int32: .*dty"):
        convert(["--input_path", "hf", "--output_path", "a.toy", "--dtype", "bf16"])
    whole = write_whole(folder / "whole.ckpt", "bfloat16")
    with pytest.raises(UserError, match=r"is bfloat16, and \.toy files hold .*--format"):
        transform(["--src_ckpt_dir", str(whole), "--dst_ckpt_dir", "cut", "--format", "toy"])
    assert sorted(one.name for one in folder.iterdir()) == ["hf", "whole.ckpt"]


def test_the_commands_offer_it(capsys):
    for command, part in ((convert, "NAME.ckpt, NAME.safetensors, NAME.toy"), (transform, "toy}")):
        with pytest.raises(SystemExit):
            command(["--help"])
        assert part in capsys.readouterr().out


def test_a_suffix_that_is_not_written(tmp_path):
    for name in ("a.bin", "a.txt"):
        with pytest.raises(ValueError, match="that are written end in"):
            file_formats.write_tensor_file(tmp_path / name, [])


def test_formats_do_not_share_a_name(toy):
    suffixes = [suffix for one in FILE_FORMATS.values() for suffix in one.suffixes]
    assert len(suffixes) == len(set(suffixes))
    assert all(name == one.name for name, one in FILE_FORMATS.items())
