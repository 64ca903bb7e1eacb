"""Learning rate against step, with MindFormers' names and meaning."""

import math
from collections.abc import Callable

from mixtral_ms.config.sections.training_section import LrScheduleSection

Schedule = Callable[[int], float]


def build_schedule(section: LrScheduleSection, total_steps: int) -> Schedule:
    """The rate of each step, counted from 0.

    Args:
        section: `lr_schedule`.
        total_steps: steps of the run; `lr_schedule.total_steps` wins where it is not -1.
    """
    total = spanned_steps(section, total_steps)
    warmup = warmup_steps(section, total_steps)
    shape = _SHAPES[section.type]

    def rate(step: int) -> float:
        if step < warmup:
            rise = section.learning_rate - section.warmup_lr_init
            return section.warmup_lr_init + rise * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        fall = section.learning_rate - section.lr_end
        return section.lr_end + fall * shape(progress, section.num_cycles)

    return rate


def spanned_steps(section: LrScheduleSection, total_steps: int) -> int:
    """Steps that the schedule spans, in a run of so many."""
    return section.total_steps if section.total_steps > 0 else total_steps


def warmup_steps(section: LrScheduleSection, total_steps: int) -> int:
    """Steps of its warm-up, in a run of so many."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return int((section.warmup_ratio or 0.0) * spanned_steps(section, total_steps))


def constant_schedule(learning_rate: float) -> Schedule:
    """The rate of a run without `lr_schedule`."""
    return lambda step: learning_rate


def _cosine(progress: float, cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress)))


def _linear(progress: float, _cycles: float) -> float:
    return 1.0 - progress


def _constant(_progress: float, _cycles: float) -> float:
    return 1.0


_SHAPES = {
    "CosineWithWarmUpLR": _cosine,
    "LinearWithWarmUpLR": _linear,
    "ConstantWarmUpLR": _constant,
}
