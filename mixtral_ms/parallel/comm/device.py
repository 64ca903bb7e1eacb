"""The device that a process computes on."""

import functools
import os

import mindspore
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

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


def zero_parameter(name: str, *shape: int, requires_grad: bool = True) -> Parameter:
    """A float32 parameter of zeros, made by an accelerator in its own memory.

    Parameter(Tensor) would make an array of the host of it, to be kept there and copied back.
    """
    if mindspore.get_context("device_target") == "CPU":
        zeros = Tensor.from_numpy(np.zeros(shape, np.float32))
        return Parameter(zeros, name=name, requires_grad=requires_grad)
    with no_init_parameters():
        without_memory = initializer("zeros", shape, mindspore.float32)
        parameter = Parameter(without_memory, name=name, requires_grad=requires_grad)
    parameter.set_data(mindspore.ops.zeros(shape, mindspore.float32))
    if not parameter.has_init:
        parameter.init_mode = None  # copies would begin with it
    return parameter
