"""How a training step is carried out, where keys leave that to the device."""

from dataclasses import dataclass

from mixtral_ms.config.loading.resolve import is_zero
from mixtral_ms.config.sections.run_section import RunConfig

_ASCEND_BUCKET_MB = 64


@dataclass(frozen=True)
class StepChoices:
    """What a step does in one of several ways that give the same numbers, within rounding.

    Attributes:
        one_host_read: add losses, figures and the gradient norm up on the device, and read them
            once a step.
        working_weights: compute with a copy of the matrices in the compute dtype, cast once a step.
        fused_update: update each tensor by one operator of the device, where it has one.
        bucket_bytes: most bytes of gradients that are reduced in one message; 0 for each by itself.
        cut_sums: keep of gradients' sums the part whose moments the rank has, see GradientSums.
    """

    one_host_read: bool = False
    working_weights: bool = False
    fused_update: bool = False
    bucket_bytes: int = 0
    cut_sums: bool = False


def step_choices(config: RunConfig) -> StepChoices:
    """As the keys say, and where they are empty as suits the device."""
    wrapper, on_ascend = config.runner_wrapper, config.context.device_target != "CPU"
    shard = config.parallel.parallel_optimizer_config.gradient_accumulation_shard
    bucket = config.parallel.gradient_bucket_mb
    narrow = config.model.model_config.compute_dtype != "float32"
    return StepChoices(
        one_host_read=_chosen(wrapper.one_host_read, on_ascend),
        working_weights=narrow and _chosen(wrapper.working_weights, on_ascend),
        fused_update=on_ascend and _chosen(config.optimizer.use_fused, True),
        cut_sums=is_zero(config) and shard,
        bucket_bytes=(_ASCEND_BUCKET_MB * on_ascend if bucket is None else bucket) << 20,
    )


def _chosen(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given
