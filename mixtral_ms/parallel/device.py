"""The device that a process computes on."""

import os

import mindspore

from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger


def set_up_device(config: RunConfig) -> None:
    """MindSpore's mode and device as `context` says. Comes before the ranks meet.

    Raises:
        UserError: this machine, or its MindSpore, does not have that device.
    """
    context = config.context
    mindspore.set_context(mode=context.mode)
    if context.device_target == "CPU":
        # where operators have run already, MindSpore refuses to be told even what it has
        if mindspore.get_context("device_target") != "CPU":
            mindspore.set_device("CPU")
        if config.runner_config.sink_mode:
            get_logger().info("runner_config.sink_mode True has no effect on CPU")
        return
    # a launcher gives each of its processes a device
    device_id = int(os.environ.get("DEVICE_ID", context.device_id))
    try:
        mindspore.set_device(context.device_target, device_id)
        mindspore.set_context(max_device_memory=context.max_device_memory)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"context.device_target {context.device_target}, device {device_id}, cannot be used on "
            "this machine: set --device_target CPU, or --device_id"
        ) from error
    mindspore.set_deterministic(context.deterministic == "ON")
