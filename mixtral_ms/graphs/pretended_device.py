"""A process that believes to be a rank of an Ascend run: enough for MindSpore's front end.

The front end parses, infers every type and shape, differentiates and optimises on the CPU; only
operators' kernels need the device. Three things stand in its way there, and are replaced while it
works: what the device is asked for by name, groups of ranks that nobody made, and parameters whose
values nobody needs.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.ops.operations import comm_ops


@dataclass
class PretendedAscend:
    """One rank of a run that is nowhere.

    Args:
        rank: its number.
    """

    rank: int
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Ranks of each group that was asked for, by name."""

    def connect(self, ranks: tuple[int, ...], _kind: str) -> str:
        """Name a group, as `Mesh` asks."""
        name = "ranks_" + "_".join(map(str, ranks))
        self.groups[name] = ranks
        return name

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """MindSpore answers as on Ascend, and operators may name groups that do not exist."""
        ask = mindspore.get_context

        def get_context(key: str) -> Any:
            return "Ascend" if key == "device_target" else ask(key)

        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(replaced(mindspore, "get_context", get_context))
            enter(replaced(comm_ops, "_get_group", lambda group: group))
            enter(replaced(comm_ops, "get_rank", self._index))
            enter(replaced(comm_ops, "get_group_size", lambda group: len(self.groups[group])))
            yield

    def _index(self, group: str) -> int:
        return self.groups[group].index(self.rank)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Parameters and tensors that are made have a type and a shape, and no memory.

    Not while a graph is parsed: it would find these functions in place of MindSpore's.
    """

    def from_numpy(array: np.ndarray) -> Tensor:
        return zeros(array.shape, Tensor(np.zeros((), array.dtype)).dtype)

    def zeros(shape: tuple[int, ...], dtype: mindspore.Type) -> Tensor:
        return initializer("zeros", shape, dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(Tensor, "from_numpy", staticmethod(from_numpy)))
        stack.enter_context(replaced(mindspore.ops, "zeros", zeros))
        stack.enter_context(replaced(Parameter, "init_param", False))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, until the end."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
