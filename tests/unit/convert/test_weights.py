"""Weights of any format under our names: whole tensors, regions, and what does not fit."""

import contextlib

import numpy as np
import pytest
import safetensors.numpy
from helpers import convert_oracle as oracle

from mixtral_ms.checkpoint.formats.dtype_casts import cast
from mixtral_ms.checkpoint.formats.safetensors_format import write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import outgoing
from mixtral_ms.convert.formats.found_weights import find_weights
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes

CONFIG = oracle.network(theta=1e6)
MOE = "model.layers.1.block_sparse_moe."
ROUTER = "model.layers.1.feed_forward.routed_experts.router.dense.weight"
EXPERTS = "model.layers.1.feed_forward.routed_experts.ffn.w2.weight"


@contextlib.contextmanager
def logged(caplog):
    """The package's logger does not pass its lines on to pytest's."""
    logger = get_logger()
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", oracle.MAKERS)
def test_every_format_reads_as_ours(name, tmp_path):
    expected = oracle.MAKERS["ours"](oracle.write_source(tmp_path / name, name))
    weights = open_weights(find_weights(tmp_path / name), CONFIG)
    assert set(weights.infos) == set(expected) == set(parameter_shapes(CONFIG))
    random = np.random.default_rng(1)
    for key, array in expected.items():
        assert weights.infos[key].shape == array.shape
        np.testing.assert_array_equal(weights.read(key), array)
        for _ in range(5):
            cuts = [np.sort(random.integers(0, n + 1, 2)) for n in array.shape]
            region = tuple(slice(int(start), int(stop)) for start, stop in cuts)
            np.testing.assert_array_equal(weights.read(key, region), array[region])


def test_what_does_not_fit_is_listed_or_left_out(tmp_path, caplog):
    tensors = oracle.huggingface(3)
    del tensors[MOE + "gate.weight"]
    tensors[MOE + "experts.2.w2.weight"] = np.zeros((3, 2), np.float32)
    tensors["model.other.weight"] = np.zeros(1, np.float32)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        open_weights(find_weights(path), CONFIG)
    for part in (
        f"--load_checkpoint: {path}",
        "3 tensors",
        MOE + "gate.weight is missing",
        MOE + "experts.2.w2.weight has shape (3, 2), expected is (12, 10)",
        "model.other.weight is no weight of Mixtral's",
        "--allow_partial",
    ):
        assert part in str(caught.value)
    with logged(caplog):
        weights = open_weights(find_weights(path), CONFIG, allow_partial=True)
    assert set(parameter_shapes(CONFIG)) - set(weights.infos) == {ROUTER, EXPERTS}
    assert [one.endswith(": skipped") for one in caplog.messages] == [True] * 3


def test_other_numerics_than_the_weights_were_made_with_are_named(tmp_path, caplog):
    oracle.write_source(tmp_path / "hf", "hf", rope_theta=5e5)
    with logged(caplog):
        open_weights(find_weights(tmp_path / "hf"), CONFIG)
    (line,) = caplog.messages
    assert "config.json says rope_theta 500000.0" in line and "1000000.0" in line


def test_bfloat16_stays_bits(tmp_path):
    expected = oracle.MAKERS["ours"](oracle.huggingface(3))
    bits = {key: cast(value, "float32", "bfloat16") for key, value in expected.items()}
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, [outgoing(k, v, "bfloat16") for k, v in bits.items()], {})
    weights = open_weights(find_weights(path), CONFIG)
    assert weights.infos[EXPERTS].dtype == "bfloat16"
    np.testing.assert_array_equal(weights.read(EXPERTS), bits[EXPERTS])
