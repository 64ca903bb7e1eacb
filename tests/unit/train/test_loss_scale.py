"""The loss scale shrinks at once, grows slowly, and stays within its floor."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.config.sections.training_section import ScaleSenseSection
from mixtral_ms.train.step.loss_scale import LossScale, build_loss_scale


def after(scale, overflows):
    for overflow in overflows:
        scale.update(overflow)
    return scale


def dynamic(**keys):
    return build_loss_scale(ScaleSenseSection(**keys))


def test_an_overflow_halves_it():
    assert after(dynamic(loss_scale_value=1024.0), [True]).value == 512


def test_it_doubles_after_a_window_without_overflow():
    scale = dynamic(loss_scale_value=8.0, scale_window=3)
    assert after(scale, [False, False]).value == 8
    assert after(scale, [False]).value == 16
    assert after(scale, [False] * 3).value == 32


def test_an_overflow_begins_the_window_again():
    scale = dynamic(loss_scale_value=8.0, scale_window=3)
    assert after(scale, [False, False, True, False, False]).value == 4
    assert after(scale, [False]).value == 8


def test_it_stops_at_its_floor_and_grows_from_there():
    scale = dynamic(loss_scale_value=8.0, scale_window=1, min_loss_scale=3.0)
    assert after(scale, [True] * 5).value == 3
    assert after(scale, [False]).value == 6


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.sampled_from([1.0, 4.0]))
def test_its_value_follows_from_the_overflows(overflows, window, floor):
    scale = after(LossScale(2.0**10, 2.0, window, floor), overflows)
    exponent, quiet = 10, 0
    for overflow in overflows:
        quiet = 0 if overflow else quiet + 1
        exponent += -1 if overflow else int(quiet == window)
        quiet %= window
        exponent = max(exponent, int(math.log2(floor)))
    assert (scale.value, scale.good_steps) == (2.0**exponent, quiet)


@given(st.lists(st.booleans(), max_size=60))
def test_a_fixed_scale_and_no_scale_never_change(overflows):
    assert after(build_loss_scale(128.0), overflows).value == 128
    assert after(build_loss_scale(None), overflows).value == 1


def test_it_counts_the_overflows_since_the_last_good_step():
    scale = after(LossScale(), [True, False, True, True])
    assert scale.skipped_in_a_row == 2
    assert after(scale, [False]).skipped_in_a_row == 0
