"""What a conversion wrote is compared with its record by every reader, file and folder alike."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from helpers import convert_oracle as oracle

from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.checkpoint.reshard.transform_checkpoint import TransformOptions, transform
from mixtral_ms.cli.support.inspection import inspect_checkpoint
from mixtral_ms.convert.formats.found_weights import find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.convert.job.conversion import ConvertOptions, convert, prepare
from mixtral_ms.errors import UserError

NETWORK = oracle.network(theta=1e6)
OUTPUTS = {
    "m.ckpt": ("m.ckpt", "m.ckpt.json"),
    "m.safetensors": ("m.safetensors", "m.safetensors.json"),
    "hf": ("hf/model.safetensors", "hf/conversion.json"),
    "shards": ("shards/model-00002-of-00007.safetensors", "shards/conversion.json"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every output, of two sources of the same shapes: a/ and, with other values, b/."""
    root = tmp_path_factory.mktemp("recorded")
    for name, theta in (("a", 1e4), ("b", 1e6)):
        (root / name).mkdir()
        source = root / f"source_{name}"
        oracle.write_source(source, "hf", rope_theta=theta)
        if name == "b":
            tensors = oracle.huggingface(3, seed=1)
            safetensors.numpy.save_file(tensors, source / "model.safetensors")
        for output in OUTPUTS:
            to = "hf" if output in ("hf", "shards") else "ours"
            size = 3000 if output == "shards" else 10**9
            options = ConvertOptions(source, root / name / output, to, max_shard_bytes=size)
            convert(prepare(options))
    return root


@pytest.fixture
def outputs(written, tmp_path):
    return shutil.copytree(written / "a", tmp_path / "a")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 64
    path.write_bytes(data)


def converted(path, to):
    return convert(prepare(ConvertOptions(path, path.parent / "out" / to, to)))


READERS = {
    "convert to gmm": lambda path: converted(path, "gmm"),
    "convert to HF": lambda path: converted(path, "hf"),
    "load_checkpoint, pipeline": lambda path: open_weights(find_weights(path), NETWORK),
    "transform": lambda path: transform(TransformOptions(path, path.parent / "cut")),
    "a checkpoint's own tools": open_source,
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit(output, reader, outputs):
    file, record = OUTPUTS[output]
    flip(outputs / file)
    with pytest.raises(UserError) as caught:
        READERS[reader](outputs / output)
    for part in (file.rpartition("/")[2], record.rpartition("/")[2], "was changed"):
        assert part in str(caught.value)
    assert not (outputs / "out").exists() and not (outputs / "cut").exists()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("reader", READERS)
def test_whole_ones_are_read(output, reader, outputs):
    READERS[reader](outputs / output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_other_weights_beside_a_stale_record(output, written, outputs):
    """The record would decide over rope_theta and the number of experts a token."""
    file, record = OUTPUTS[output]
    shutil.copyfile(written / "b" / file, outputs / file)
    for reader in READERS.values():
        with pytest.raises(UserError, match="move .* away"):
            reader(outputs / output)
    (outputs / record).unlink()
    open_found(find_weights(outputs / output))


@pytest.mark.parametrize("named", ["ck/rank_0/model.safetensors", "ck/rank_0"])
def test_a_part_of_a_checkpoint_is_compared_with_its_manifest(named, written, tmp_path):
    convert(prepare(ConvertOptions(written / "source_a", tmp_path / "ck", "ours")))
    open_found(find_weights(tmp_path / named))
    flip(tmp_path / "ck" / "rank_0" / "model.safetensors")
    for reader in READERS.values():
        with pytest.raises(UserError, match="manifest of its checkpoint.*was changed"):
            reader(tmp_path / named)
    assert any("was changed" in one for one in inspect_checkpoint(tmp_path / named).problems)


def test_both_renamed_are_still_a_pair(outputs):
    for name in ("m.ckpt", "m.ckpt.json"):
        (outputs / name).rename(outputs / name.replace("m.", "renamed."))
    open_found(find_weights(outputs / "renamed.ckpt"))
    flip(outputs / "renamed.ckpt")
    with pytest.raises(UserError, match="renamed.ckpt is not what renamed.ckpt.json"):
        open_found(find_weights(outputs / "renamed.ckpt"))


def test_a_json_file_of_anothers_beside_weights_is_no_record(outputs):
    (outputs / "m.ckpt.json").write_text(json.dumps({"files": 3, "hidden_size": 5}))
    open_found(find_weights(outputs / "m.ckpt"))


def first(files):
    return next(iter(files.values()))


def tensor(files):
    return next(iter(first(files)["tensors"].values()))


@pytest.mark.parametrize("value", [{}, [1], 3, None, "klingon"])
def test_a_format_that_is_none_is_found_by_the_names(value, outputs):
    record = outputs / "m.ckpt.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_format": value}))
    assert find_weights(outputs / "m.ckpt").format_name is None
    converted(outputs / "m.ckpt", "gmm")


def test_a_record_of_a_network_that_the_target_has_no_place_for_is_named(outputs):
    record = outputs / "m.ckpt.json"
    data = json.loads(record.read_text())
    data["model_config"]["qkv_has_bias"] = True
    record.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"m\.ckpt: the format hf .*has no place for"):
        converted(outputs / "m.ckpt", "hf")


RECORD_DAMAGES = {
    "a tensor without shape": lambda files: tensor(files).pop("shape"),
    "a tensor without hash": lambda files: tensor(files).pop("sha256"),
    "a shape that is a number": lambda files: tensor(files).update(shape=3),
    "a size that is a text": lambda files: first(files).update(size="8"),
    "a tensor that is a list": lambda files: first(files)["tensors"].update(x=[]),
    "no hash of the header": lambda files: first(files).pop("header_sha256"),
    "null for a file": lambda files: files.update({next(iter(files)): None}),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES)
@pytest.mark.parametrize("output", ["m.safetensors", "hf"])
def test_a_damaged_record_is_named(output, damage, outputs):
    assert_record_is_refused(outputs, output, RECORD_DAMAGES[damage])


def test_a_record_that_names_files_elsewhere_is_refused(outputs):
    assert_record_is_refused(
        outputs, "hf", lambda files: files.update({"../../secret": first(files)})
    )


def assert_record_is_refused(outputs, output, damage):
    record = outputs / OUTPUTS[output][1]
    data = json.loads(record.read_text())
    damage(data["files"])
    record.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{record.name} is damaged"):
        open_found(find_weights(outputs / output))
    assert any("is damaged" in one for one in inspect_checkpoint(outputs / output).problems)


def test_values_are_those_of_the_file(outputs):
    """What the comparison lets through is what is read."""
    tensors = safetensors.numpy.load_file(outputs / "hf" / "model.safetensors")
    source = open_found(find_weights(outputs / "hf"))
    for name, values in tensors.items():
        np.testing.assert_array_equal(source.read(name), values)
