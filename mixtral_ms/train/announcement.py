"""What a training run says before its first step: what it trains, and what limits it."""

from collections.abc import Iterator

from mixtral_ms.config import RunConfig
from mixtral_ms.config.loading.resolve import sequences_per_step
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.state.lora_run import trained_text
from mixtral_ms.train.step.lr_schedule import spanned_steps, warmup_steps
from mixtral_ms.train.step_plan import StepPlan


def announce(
    config: RunConfig, plan: StepPlan, network: MixtralForCausalLM, loader: RecordLoader, step: int
) -> None:
    """Log what is trained and for how long, from the step behind `step` on."""
    moe = config.moe_config
    get_logger().info(
        "%s, %s kernels, %s; aux loss %s, z loss %s",
        trained_text(network.config),
        network.kernel_name,
        "dropless" if moe.dropless else f"capacity factor {moe.capacity_factor:g}",
        f"x {moe.aux_loss_factor:g}" if moe.aux_loss_factor else "off",
        f"x {moe.z_loss_factor:g}" if moe.z_loss_factor else "off",
    )
    get_logger().info(
        "steps %d to %d of %d, %d an epoch; compiling the graph at the first one",
        step + 1,
        plan.last_step,
        plan.total_steps,
        plan.steps_per_epoch,
    )
    for line in limits(config, plan, loader.records):
        get_logger().info(line)


def limits(config: RunConfig, plan: StepPlan, records: int) -> Iterator[str]:
    """What of the configuration the data, or the length of the run, does not let come about.

    Args:
        config: the run.
        plan: its steps.
        records: that are used.
    """
    left_out = records - plan.steps_per_epoch * sequences_per_step(config)
    if left_out and plan.last_step >= plan.steps_per_epoch:
        yield (
            f"{left_out} of {records} records are left out in each epoch: they do not fill a step "
            f"of {sequences_per_step(config)}"
        )
    stop, schedule = config.runner_config.stop_at_step, config.lr_schedule
    if stop and stop > plan.total_steps:
        yield (
            f"runner_config.stop_at_step {stop} is behind the last step, {plan.total_steps}: the "
            "run does not stop there"
        )
    if schedule is None:
        return
    span = spanned_steps(schedule, plan.total_steps)
    if span != plan.total_steps:
        yield f"lr_schedule.total_steps {span} is not that of the run, {plan.total_steps}"
    warmup = warmup_steps(schedule, plan.total_steps)
    if warmup >= plan.total_steps:
        yield (
            f"lr_schedule's warm-up of {warmup} steps is longer than the run of "
            f"{plan.total_steps}: learning_rate {schedule.learning_rate:g} is never reached"
        )
