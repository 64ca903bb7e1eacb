"""The device that a process computes on."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from mixtral_ms.config.sections.fields import INERT
from mixtral_ms.config.sections.run_section import (
    AscendConfig,
    ContextSection,
    JitConfig,
    RunConfig,
)
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.launched import DEVICE, HCCL_WAITS, is_launched, own_device


def set_up_device(config: RunConfig) -> None:
    """MindSpore's mode, device and run-time settings as `context` says, before the ranks meet.

    Raises:
        UserError: the device cannot be used, or this process has another one already.
    """
    context = config.context
    mindspore.set_context(mode=context.mode)
    if context.save_graphs:
        mindspore.set_context(
            save_graphs=context.save_graphs, save_graphs_path=context.save_graphs_path
        )
    if context.device_target == "CPU":
        # where operators have run already, MindSpore refuses to be told even what it has
        if mindspore.get_context("device_target") != "CPU":
            mindspore.set_device("CPU")
        for key in _acts_on_ascend_only(config):
            get_logger().info("%s has no effect on CPU", key)
        return
    device_id = context.device_id
    if is_launched():  # a launcher gives each of its processes a device
        given = own_device()
        device_id = device_id if given is None else given
        _say_how_long_ranks_wait()
    elif os.environ.get(DEVICE, str(device_id)) != str(device_id):
        get_logger().info(
            "%s %s of the environment has no effect without a launcher: context.device_id is %d",
            DEVICE,
            os.environ[DEVICE],
            device_id,
        )
    # as text, since MindSpore is told once for all trainers of the process, if they agree
    _take(context.device_target, device_id, json.dumps(dataclasses.asdict(context)))


def _acts_on_ascend_only(config: RunConfig) -> list[str]:
    """Keys with another value than their default, as `key value`, that are for an Ascend alone."""
    context, without = config.context, ContextSection()
    keys = {name: getattr(context, name) for name in _ASCEND_KEYS}
    defaults = {name: getattr(without, name) for name in _ASCEND_KEYS}
    for section in ("jit_config", "ascend_config"):
        keys |= _flat(section, getattr(context, section))
        defaults |= _flat(section, getattr(without, section))
    given = [f"context.{key} {value}" for key, value in keys.items() if value != defaults[key]]
    if config.parallel_config.hccl_buffer_size is not None:
        given.append("parallel_config.hccl_buffer_size")
    return given


_ASCEND_KEYS = (
    "exec_order",
    "memory_optimize_level",
    "mempool_block_size",
    "affinity_cpu_list",
    "pynative_synchronize",
)


def _flat(section: str, values: JitConfig | AscendConfig) -> dict[str, object]:
    """The fields that act, under their path; the others have been spoken of."""
    return {
        f"{section}.{field.name}": getattr(values, field.name)
        for field in dataclasses.fields(values)
        if INERT not in field.metadata
    }


def _say_how_long_ranks_wait() -> None:
    """HCCL's time-outs, which a launcher of another kind than ours leaves unset."""
    for name, seconds in HCCL_WAITS.items():
        os.environ.setdefault(name, seconds)
    waits = ", ".join(f"{name} {os.environ[name]}" for name in HCCL_WAITS)
    get_logger().info("ranks wait for one another so many seconds: %s", waits)


@functools.cache  # MindSpore refuses to be told some of it again
def _take(target: str, device_id: int, settings: str) -> None:
    context = json.loads(settings)
    memory = context["max_device_memory"]
    try:
        mindspore.set_device(target, device_id)
        for name, value in _runtime_settings(context).items():
            mindspore.set_context(**{name: value})
        mindspore.set_deterministic(context["deterministic"] == "ON")
        if context["affinity_cpu_list"]:
            mindspore.runtime.set_cpu_affinity(True, context["affinity_cpu_list"])
        if context["pynative_synchronize"]:
            mindspore.runtime.launch_blocking()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"context.device_target {target}, device {device_id}, max_device_memory {memory}, "
            f"cannot be used: {reason} (set --device_target CPU where there is no such device)"
        ) from error


def _runtime_settings(context: Mapping[str, Any]) -> dict[str, Any]:
    """What `mindspore.set_context` is told of a device; what is left empty it is not told."""
    ascend = {name: context["ascend_config"][name] for name in _ASCEND_CONFIG}
    settings = {
        "max_device_memory": context["max_device_memory"],
        "memory_optimize_level": context["memory_optimize_level"],
        "mempool_block_size": context["mempool_block_size"],
        "jit_config": {"jit_level": context["jit_config"]["jit_level"]},
        "exec_order": context["exec_order"],
        "ascend_config": {name: value for name, value in ascend.items() if value is not None},
    }
    return {name: value for name, value in settings.items() if value not in (None, {})}


_ASCEND_CONFIG = tuple(
    field.name for field in dataclasses.fields(AscendConfig) if INERT not in field.metadata
)


def hccl_options(megabytes: int) -> Any:
    """MindSpore's options of a group whose HCCL buffers have so many MB."""
    from mindspore._c_expression import GroupOptions  # noqa: PLC0415 - as its documentation has it

    options = GroupOptions()
    options.hccl_config = {"hccl_buffer_size": megabytes}
    return options


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
