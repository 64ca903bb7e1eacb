"""Names of dtypes in YAML, and what a device makes of them."""

import functools

import mindspore
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger

COMPUTE_DTYPES = {
    "float32": mstype.float32,
    "float16": mstype.float16,
    "bfloat16": mstype.bfloat16,
}


def compute_type(name: str) -> mstype.Type:
    """The dtype to compute in; bfloat16 falls back to float32 on CPU, with one log line.

    Raises:
        UserError: a name that is not float32, float16 or bfloat16.
    """
    if name not in COMPUTE_DTYPES:
        raise UserError(f"dtype {name!r}: allowed are {', '.join(COMPUTE_DTYPES)}")
    if name == "bfloat16" and mindspore.get_context("device_target") == "CPU":
        _say_fallback()
        return mstype.float32
    return COMPUTE_DTYPES[name]


@functools.cache
def _say_fallback() -> None:
    get_logger().info("bfloat16 is computed as float32: MindSpore's CPU operators lack bfloat16")
