"""How a training step is carried out, where keys leave that to the device."""

from dataclasses import dataclass

from mixtral_ms.config.sections.run_section import RunConfig


@dataclass(frozen=True)
class StepChoices:
    """What a step does in one of several ways that give the same numbers, within rounding.

    Attributes:
        one_host_read: add losses, figures and the gradient norm up on the device, and read them
            once a step.
    """

    one_host_read: bool = False


def step_choices(config: RunConfig) -> StepChoices:
    """As the keys say, and where they are empty as suits the device."""
    on_cpu = config.context.device_target == "CPU"
    one_read = config.runner_wrapper.one_host_read
    return StepChoices(one_host_read=not on_cpu if one_read is None else one_read)
