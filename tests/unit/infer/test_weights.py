"""Weights from a file: views where nothing is cast, and a clear word where something is wrong."""

import numpy as np
import pytest
import torch
from helpers.numpy_runner import random_tensors
from helpers.tiny import tiny_config
from safetensors.torch import save_file

from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners import infer_weights as module
from mixtral_ms.infer.runners.infer_weights import load_weights

CONFIG = tiny_config(qkv_has_bias=True)
TENSORS = random_tensors(CONFIG)
W1 = "model.layers.1.feed_forward.routed_experts.ffn.w1.weight"
KEPT = ("embedding_weight", "norm.weight", "norm_out.weight", "router.dense.weight", "bias")


def source(tmp_path, tensors, dtype=torch.float32):
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.tensor(value).to(dtype) for name, value in tensors.items()}
    save_file(tensors, path)
    return open_tensors(path)


def test_float32_stays_in_the_file(tmp_path):
    loaded = load_weights(source(tmp_path, TENSORS), CONFIG)
    assert list(loaded.tensors) == list(TENSORS)
    for name, value in TENSORS.items():
        got = loaded.tensors[name]
        np.testing.assert_array_equal(got, value)
        assert got.flags.c_contiguous
        assert not got.flags.owndata
        assert not got.flags.writeable
    assert loaded.scales == {}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["float32", "float16"])
def test_casts_equal_torch(tmp_path, stored, wanted):
    loaded = load_weights(source(tmp_path, TENSORS, stored), CONFIG, wanted)
    for name, value in TENSORS.items():
        dtype = "float32" if name.endswith(KEPT) else wanted
        expected = torch.tensor(value).to(stored).to(getattr(torch, dtype)).numpy()
        assert loaded.tensors[name].dtype == dtype
        np.testing.assert_array_equal(loaded.tensors[name], expected)


@pytest.mark.parametrize("piece", [64, 1 << 26])
def test_int8_has_a_scale_for_each_output_row(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "_PIECE_BYTES", piece)
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    tensors[W1][2, 5] = 0
    loaded = load_weights(source(tmp_path, tensors), CONFIG, "int8")
    for name, value in tensors.items():
        got = loaded.tensors[name]
        if name.endswith(KEPT):
            np.testing.assert_array_equal(got, value)
            assert name not in loaded.scales
            continue
        scale = loaded.scales[name]
        assert (got.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, value.shape[:-1])
        assert got.min() >= -127
        error = np.abs(got * scale[..., None] - value)
        assert (error <= scale[..., None] * 0.5001).all()
        peaks = np.abs(got).max(-1)
        assert set(np.unique(peaks)) <= {0, 127}
    assert not loaded.tensors[W1][2, 5].any()


def test_what_does_not_fit_is_listed(tmp_path):
    tensors = dict(TENSORS)
    del tensors["lm_head.weight"], tensors[W1]
    tensors["adam_m.x"] = np.zeros(3, np.float32)
    tensors["model.norm_out.weight"] = np.zeros(7, np.float32)
    with pytest.raises(UserError) as caught:
        load_weights(source(tmp_path, tensors), CONFIG)
    message = str(caught.value)
    assert "model.safetensors" in message
    assert f"2 tensors are missing: {W1}, lm_head.weight" in message
    assert "1 tensors are not of this network: adam_m.x" in message
    assert "model.norm_out.weight [7] instead of [24]" in message


def test_tensors_of_whole_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="embedding_weight int32, .* and 21 more"):
        load_weights(source(tmp_path, {**TENSORS}, torch.int32), CONFIG)


def test_a_long_list_is_cut(tmp_path):
    with pytest.raises(UserError, match="29 tensors are missing: .* and 21 more; 1 tensors"):
        load_weights(source(tmp_path, {"x": np.zeros(1, np.float32)}), CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wanted", ["float32", "float16", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_is_counted_and_named(tmp_path, value, wanted, stored):
    tensors = {name: array.copy() for name, array in TENSORS.items()}
    tensors[W1][3, 1, 2] = tensors[W1][0, 0, 0] = value
    with pytest.raises(UserError, match=rf"in {W1} \(2 of 3840 values\)"):
        load_weights(source(tmp_path, tensors, stored), CONFIG, wanted)


def test_values_too_large_for_float16_are_counted_and_named(tmp_path):
    tensors = {name: array.copy() for name, array in TENSORS.items()}
    tensors[W1][3, 1, 2] = 7e4
    opened = source(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"{W1} \(1 of 3840 values\); give --weight_dtype float32"):
        load_weights(opened, CONFIG, "float16")
    assert load_weights(opened, CONFIG, "int8").scales[W1].max() > 500


def test_large_but_finite_values_are_no_error(tmp_path):
    tensors = {name: array.copy() for name, array in TENSORS.items()}
    tensors[W1][...] = 1e30  # their squares are infinite
    loaded = load_weights(source(tmp_path, tensors), CONFIG)
    assert loaded.tensors[W1].max() == np.float32(1e30)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="'int4': allowed are float32, float16, int8"):
        load_weights(source(tmp_path, TENSORS), CONFIG, "int4")
