"""Numbers of the host on their way through collectives that know float32 only."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from mixtral_ms.parallel.comm.process_groups import float32_parts, float64_of


@given(st.lists(st.floats(), max_size=5))
@example([1e308, 5e-324, -0.0, 1 / 3])
def test_float64_survives_as_float32(values):
    values = np.array(values, np.float64)
    parts = float32_parts(values)
    assert parts.dtype == np.float32
    np.testing.assert_array_equal(float64_of(parts), values)
