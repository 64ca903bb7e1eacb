"""Casts between float types, bit for bit against PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.checkpoint.formats.dtype_casts import cast, count_fp16_losses
from mixtral_ms.checkpoint.formats.tensor_source import carrier

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def edges():
    """float32 values around every border of the two narrow types, and random bits."""
    narrow = [cast(ALL_16_BITS, "bfloat16", "float32")]
    narrow.append(ALL_16_BITS.view(np.float16).astype(np.float32))
    near = np.concatenate(narrow).view(np.uint32)
    halves = (near[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000], np.uint32)).T
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    return np.concatenate([halves.reshape(-1), random]).view(np.float32)


def values(dtype):
    if dtype == "float32":
        return edges()
    return ALL_16_BITS.view(carrier(dtype))


def as_torch(array, dtype):
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits(tensor):
    kinds = {2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(kinds[tensor.element_size()]).numpy()


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_casts_are_pytorchs_bit_for_bit(source, target):
    array = values(source)
    before = array.tobytes()
    got = cast(array, source, target)
    assert got.dtype == carrier(target)
    expected = as_torch(array, source).to(TORCH[target])
    nan = expected.isnan()
    np.testing.assert_array_equal(as_torch(got, target).isnan().numpy(), nan.numpy())
    np.testing.assert_array_equal(bits(as_torch(got, target))[~nan], bits(expected)[~nan])
    assert array.tobytes() == before


def test_bfloat16_to_float32_and_back_changes_no_bit():
    wide = cast(ALL_16_BITS, "bfloat16", "float32")
    np.testing.assert_array_equal(cast(wide, "float32", "bfloat16"), ALL_16_BITS)


def test_nan_whose_payload_is_lost_stays_nan():
    one = np.array([0x7F800001, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    got = cast(cast(one, "float32", "bfloat16"), "bfloat16", "float32")
    assert np.isnan(got).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_strides_and_scalars(dtype):
    array = values(dtype)[:60000].reshape(200, 300).T[::3]
    for target in TORCH:
        whole = cast(np.ascontiguousarray(array), dtype, target)
        assert cast(array, dtype, target).tobytes() == whole.tobytes()
    assert cast(array[0, 0].reshape(()), dtype, "bfloat16").shape == ()


@pytest.mark.parametrize("dtype", TORCH)
def test_losses_are_what_the_cast_loses(dtype):
    array = values(dtype)
    wide = cast(array, dtype, "float32")
    narrow = cast(array, dtype, "float16")
    overflow = int((np.isfinite(wide) & np.isinf(narrow)).sum())
    underflow = int(((wide != 0) & (narrow == 0)).sum())
    assert count_fp16_losses(array, dtype) == (overflow, underflow)
    assert (overflow > 0) == (underflow > 0) == (dtype != "float16")


@given(st.lists(st.floats(width=32), max_size=20))
def test_losses_of_any_values(numbers):
    array = np.array(numbers, np.float32)
    half = torch.from_numpy(array).half()
    overflow = int((np.isfinite(array) & half.isinf().numpy()).sum())
    underflow = int(((array != 0) & (half == 0).numpy()).sum())
    assert count_fp16_losses(array, "float32") == (overflow, underflow)


def test_other_casts_are_refused():
    with pytest.raises(ValueError, match="cannot cast int32 to float32"):
        cast(np.zeros(2, np.int32), "int32", "float32")
    with pytest.raises(ValueError, match="bfloat16 travels as uint16, not float32"):
        cast(np.zeros(2, np.float32), "bfloat16", "float32")
    integers = np.arange(3)
    assert cast(integers, "int64", "int64") is integers
