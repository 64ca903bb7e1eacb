"""The device that a process computes on."""

import functools
import os

import mindspore

from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.launched import is_launched


def set_up_device(config: RunConfig) -> None:
    """MindSpore's mode and device as `context` says. Comes before the ranks meet.

    Raises:
        UserError: the device cannot be used, or this process has another one already.
    """
    context = config.context
    mindspore.set_context(mode=context.mode)
    if context.device_target == "CPU":
        # where operators have run already, MindSpore refuses to be told even what it has
        if mindspore.get_context("device_target") != "CPU":
            mindspore.set_device("CPU")
        if config.runner_config.sink_mode and config.mode.trains:
            get_logger().info("runner_config.sink_mode True has no effect on CPU")
        return
    device_id = context.device_id
    if is_launched():  # a launcher gives each of its processes a device
        device_id = int(os.environ.get("DEVICE_ID", device_id))
    deterministic = context.deterministic == "ON"
    _take(context.device_target, device_id, context.max_device_memory, deterministic)


@functools.cache  # MindSpore refuses to be told some of it again
def _take(target: str, device_id: int, memory: str, deterministic: bool) -> None:
    try:
        mindspore.set_device(target, device_id)
        mindspore.set_context(max_device_memory=memory)
        mindspore.set_deterministic(deterministic)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"context.device_target {target}, device {device_id}, max_device_memory {memory}, "
            f"cannot be used: {reason} (set --device_target CPU where there is no such device)"
        ) from error
