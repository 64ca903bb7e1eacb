"""numpy's arrays as MindSpore's tensors: weights that a runner holds, inputs of a static shape."""

import numpy as np
from mindspore import Parameter, Tensor


def shared_parameter(name: str, value: np.ndarray) -> Parameter:
    """A parameter without gradient in the array's own memory; a copy where that is read-only."""
    # from_numpy shares the array's memory, which must be writable.
    value = value if value.flags.writeable else value.copy()
    return Parameter(Tensor.from_numpy(value), name=name, requires_grad=False)


def padded(values_T: np.ndarray, size: int, filler: int) -> np.ndarray:
    """int32 (size,): the values, then filler."""
    result = np.full(size, filler, np.int32)
    result[: len(values_T)] = values_T
    return result
