"""Which layers select_recompute means."""

import pytest

from mixtral_ms.config.derived.recomputed_layers import names_operators, selected_layers
from mixtral_ms.errors import UserError

LAYERS = [3, 4]


@pytest.mark.parametrize(
    "value, expected",
    [
        (False, [0, 0]),
        (True, [3, 4]),
        ([2, 9], [2, 4]),
        ([True, False], [3, 0]),
        ({r"feed_forward\.mul": True}, [0, 0]),
        ([r"feed_forward\.mul"], [0, 0]),
    ],
)
def test_layers_of_each_stage(value, expected):
    assert selected_layers(value, LAYERS) == expected
    assert names_operators(value) == ("feed" in str(value))


@pytest.mark.parametrize("value", [[1], [1, 2, 3], [[1, 2], [3, 4]], [1, -1], [1, 0.5]])
def test_a_list_that_does_not_fit_the_stages(value):
    with pytest.raises(UserError, match=r"select_recompute .*pipeline_stage 2"):
        selected_layers(value, LAYERS)
