"""One way to say how far two tensors are apart."""

import numpy as np


def relative_error(got, expected) -> float:
    """Largest difference as a share of the expected tensor's largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    assert np.isfinite(got).all(), "a value is not finite"
    scale = np.abs(expected).max(initial=0.0)
    difference = np.abs(got - expected).max(initial=0.0)
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(got, expected, tolerance, what="the tensor"):
    """Returns the relative error, or fails with it."""
    error = relative_error(got, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"
    return error
