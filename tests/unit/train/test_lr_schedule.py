"""Learning rates against formulas written another way."""

import numpy as np
import pytest

from mixtral_ms.config.sections.training_section import LrScheduleSection
from mixtral_ms.train.step.lr_schedule import build_schedule, constant_schedule

TYPES = ["CosineWithWarmUpLR", "LinearWithWarmUpLR", "ConstantWarmUpLR"]
PEAK, END, START = 3e-4, 2e-5, 1e-6


def section(kind, **keys):
    given = {"learning_rate": PEAK, "lr_end": END, "warmup_lr_init": START, "warmup_steps": 10}
    return LrScheduleSection(type=kind, **{**given, **keys})


def rates(schedule, steps):
    return np.array([schedule(step) for step in range(steps)])


def expected(kind, steps, warmup, total):
    """Piecewise linear by interpolation; the cosine as a squared half angle."""
    at = np.arange(steps, dtype=np.float64)
    if kind == "LinearWithWarmUpLR":
        return np.interp(at, [0, warmup, total], [START, PEAK, END])
    rising = np.interp(at, [0, warmup], [START, PEAK])
    if kind == "ConstantWarmUpLR":
        return rising
    turn = np.clip((at - warmup) / (total - warmup), 0, 1)
    falling = END + (PEAK - END) * np.cos(np.pi / 2 * turn) ** 2
    return np.where(at < warmup, rising, falling)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("warmup", [1, 10, 99])
def test_every_step_follows_the_formula(kind, warmup):
    schedule = build_schedule(section(kind, warmup_steps=warmup), 100)
    np.testing.assert_allclose(rates(schedule, 120), expected(kind, 120, warmup, 100), rtol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
def test_warm_up_begins_at_its_first_rate_and_ends_at_the_peak(kind):
    schedule = build_schedule(section(kind), 100)
    assert schedule(0) == START
    assert schedule(10) == pytest.approx(PEAK, rel=1e-12)
    assert max(rates(schedule, 101)) == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize("kind", TYPES[:2])
def test_the_end_is_lr_end_and_stays_there(kind):
    schedule = build_schedule(section(kind), 100)
    assert schedule(99) > END
    assert schedule(100) == pytest.approx(END, rel=1e-12)
    assert schedule(1000) == schedule(100)


@pytest.mark.parametrize("kind", TYPES)
def test_without_warm_up_the_first_step_has_the_peak(kind):
    schedule = build_schedule(section(kind, warmup_steps=None), 100)
    assert schedule(0) == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize("kind", TYPES)
def test_warmup_ratio_is_a_share_of_all_steps(kind):
    by_ratio = build_schedule(section(kind, warmup_steps=None, warmup_ratio=0.25), 80)
    by_steps = build_schedule(section(kind, warmup_steps=20), 80)
    assert list(rates(by_ratio, 81)) == list(rates(by_steps, 81))


@pytest.mark.parametrize("kind", TYPES)
def test_total_steps_wins_over_the_length_of_the_run(kind):
    schedule = build_schedule(section(kind, total_steps=50), 1000)
    np.testing.assert_allclose(rates(schedule, 60), expected(kind, 60, 10, 50), rtol=1e-12)


def test_a_whole_cosine_wave_returns_to_the_peak():
    schedule = build_schedule(section("CosineWithWarmUpLR", num_cycles=1.0), 110)
    assert schedule(60) == pytest.approx(END, rel=1e-9)
    assert schedule(110) == pytest.approx(PEAK, rel=1e-12)


def test_no_schedule_is_a_constant():
    assert {constant_schedule(0.5)(step) for step in (0, 7, 10**6)} == {0.5}
