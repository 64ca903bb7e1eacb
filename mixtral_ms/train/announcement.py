"""What a training run says before its first step: what it trains, and what limits it."""

from mixtral_ms.config import RunConfig
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.state.lora_run import trained_text
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
