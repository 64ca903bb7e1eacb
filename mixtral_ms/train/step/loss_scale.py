"""Loss scale: gradients that float16 would round to zero are computed larger."""

from dataclasses import dataclass

from mixtral_ms.config.sections.training_section import ScaleSenseSection


@dataclass
class LossScale:
    """A scale that shrinks at an overflow and grows after a quiet time (arXiv 1710.03740).

    Attributes:
        value: what the loss is multiplied by.
        factor: shrink and grow by this; 1 keeps the scale fixed.
        window: steps in a row without overflow before it grows.
        floor: it never shrinks below this.
        good_steps: steps since the last change.
        skipped_in_a_row: steps that overflowed since the last good one.
    """

    value: float = 1.0
    factor: float = 1.0
    window: int = 1000
    floor: float = 1.0
    good_steps: int = 0
    skipped_in_a_row: int = 0

    def update(self, overflow: bool) -> None:
        """Take note of one step."""
        if overflow:
            self.value = max(self.floor, self.value / self.factor)
            self.good_steps = 0
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.value *= self.factor
            self.good_steps = 0


def build_loss_scale(section: ScaleSenseSection | float | None) -> LossScale:
    """The loss scale that `runner_wrapper.scale_sense` asks for: none, fixed or dynamic."""
    if section is None:
        return LossScale()
    if isinstance(section, int | float):
        return LossScale(value=float(section), floor=float(section))
    return LossScale(
        value=section.loss_scale_value,
        factor=section.scale_factor,
        window=section.scale_window,
        floor=section.min_loss_scale,
    )
