"""The connection between the processes of a run, and what the host itself sends over it.

Collectives inside the compiled network are in collectives.py.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mixtral_ms.config.sections.parallel_section import HcclBuffers, ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.device import hccl_options
from mixtral_ms.parallel.comm.launched import (
    is_scheduler,
    own_rank,
    require_scheduler,
    started_processes,
)
from mixtral_ms.parallel.comm.transports import count, is_simulated
from mixtral_ms.parallel.grid.mesh import Mesh, ProcessGroup

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.1  # seconds
_LEAVING_SECONDS = 2.0  # a call that meets the store's end waits for 15 s
_LAUNCHER_SECONDS = 10.0  # until the launcher would have ended this process, were it its host


_barriers: "list[_Barrier]" = []
"""That of this process, once it is connected."""


def connect(grid: ParallelConfig, met: Callable[[ProcessGroup], None] | None = None) -> Mesh:
    """Meet the other processes. To be called once, by all of them, after the device is set.

    Args:
        grid: sizes of the rank grid, the same on all of them.
        met: called with the group of all before any other group is made, to refuse what would make
            them wait for each other.
    """
    if is_scheduler():
        get_logger().info(
            "MS_ROLE is MS_SCHED: this process lets the %d others meet, and computes nothing",
            started_processes(),
        )
    if started_processes() == 1:
        if is_scheduler():
            raise SystemExit(0)  # a launcher's scheduler runs the program too, to be met by nobody
        return Mesh(grid)
    require_scheduler()
    from mindspore.communication import create_group, init  # noqa: PLC0415 - starts threads

    on_cpu = mindspore.get_context("device_target") == "CPU"
    init("mccl" if on_cpu else None)

    made: dict[tuple[int, ...], str] = {}

    def make(ranks: tuple[int, ...], kind: str) -> str:
        made[ranks] = kind
        if len(ranks) == started_processes():
            return "mccl_world_group" if on_cpu else "hccl_world_group"
        name = "ranks_" + "_".join(map(str, ranks))
        size = getattr(grid.hccl_buffer_size, kind, None)
        if on_cpu or size is None:
            create_group(name, list(ranks))
        else:
            create_group(name, list(ranks), hccl_options(size))
        return name

    mesh = Mesh(grid, own_rank(), make)
    if on_cpu:
        _barriers.append(_Barrier(mesh.world))
    if met:
        met(mesh.world)
    mesh.make_groups()
    _say_which_buffers_are_shared(mesh, made)
    return mesh


def _say_which_buffers_are_shared(mesh: Mesh, made: Mapping[tuple[int, ...], str]) -> None:
    """Of kinds with the same ranks there is one group, and its buffers are as the first says."""
    sizes = mesh.grid.hccl_buffer_size
    for ranks, first in made.items():
        for field in dataclasses.fields(HcclBuffers):
            group = None if field.name == "pair" else getattr(mesh, field.name)
            shared = group is not None and group.ranks == ranks and field.name != first
            if shared and getattr(sizes, field.name, None) is not None:
                get_logger().warning(
                    "parallel_config.hccl_buffer_size.%s has no effect: its ranks are those of %s",
                    field.name,
                    first,
                )


class _Barrier:
    """Without a timeout: waits for all ranks, however long the slowest of them takes.

    MCCL's collectives give up after 30 s, which one rank may need to compile, save or load.

    Args:
        ranks: all of them, met just now.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._store = open_store(ranks)
        self._ranks, self._waits, self._leads = ranks.size, 0, ranks.index == 0
        atexit.register(self._leave)

    def wait(self) -> None:
        """Return when every rank waits.

        Raises:
            UserError: one of them has ended. (MindSpore ends all when one is killed.)
        """
        self._waits += 1
        key, pause = f"wait {self._waits}", _SHORTEST_PAUSE
        arrived = self._store.add(key, 1)
        while arrived < self._ranks:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            left = self._store.add("left", 0)  # asked for first: they may leave once all are here
            arrived = self._store.add(key, 0)
            if left and arrived < self._ranks:
                time.sleep(_LAUNCHER_SECONDS)
                raise UserError("a process on another host has ended: what it said is there")

    def _leave(self) -> None:
        """Tell the others. The first, which holds the store, lets them do so before it goes."""
        until = time.monotonic() + _LEAVING_SECONDS
        with contextlib.suppress(RuntimeError):  # the first one has gone
            left = self._store.add("left", 1)
            while self._leads and left < self._ranks and time.monotonic() < until:
                time.sleep(_LONGEST_PAUSE)
                left = self._store.add("left", 0)


def open_store(ranks: ProcessGroup, patience: timedelta = timedelta(minutes=5)) -> Any:
    """Texts and counters that all ranks see (TCPStore), held by the first. All must open it.

    Args:
        ranks: all of them.
        patience: how long to wait for a text that nobody has set.
    """
    from mindspore.mint.distributed import TCPStore  # noqa: PLC0415 - with the connection only

    host, first = os.environ["MS_SCHED_HOST"], ranks.index == 0
    with socket.socket() as probe:
        probe.bind((host if first else "", 0))
        port = probe.getsockname()[1]
    port = gather_objects(ranks, port)[0]
    store = TCPStore(host, port, ranks.size, is_master=first, timeout=patience)
    # It stays until the process ends: while the other end closes too, its destructor may wait for
    # a thread of its own that waits for it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
    return store


def wait_for_all() -> None:
    """A barrier for every process of the run; nothing where collectives themselves wait."""
    for one in _barriers:
        one.wait()


def compile_together(mesh: Mesh, graphs: Mapping[nn.Cell, Sequence[Tensor]]) -> None:
    """Compile graphs with these inputs on all ranks before any of them runs one."""
    if mesh.connect is not None and mindspore.get_context("mode") == mindspore.GRAPH_MODE:
        for cell, inputs in graphs.items():
            cell.compile(*inputs)
        wait_for_all()


def sum_tensor(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors (float16 or 32), the same on all of them."""
    if is_simulated(group):
        count(group, tensor, 2 * (group.size - 1) / group.size)
        return tensor
    return ops.AllReduce(group=group.name)(tensor) if group.size > 1 else tensor


def sum_values(group: ProcessGroup, values: np.ndarray | float) -> np.ndarray:
    """As `sum_tensor`, of numbers of the host, in float64. Of all ranks: waits for the slowest."""
    if group.size == 1:
        return np.asarray(values, np.float64)
    if group.kind == "world":
        wait_for_all()
    values = np.asarray(values, np.float64)
    slots = np.zeros((group.size, 4, values.size), np.float32)
    slots[group.index] = float32_parts(values.reshape(-1))
    parts = sum_tensor(group, Tensor(slots)).asnumpy()
    return sum(map(float64_of, parts), np.zeros(values.size)).reshape(values.shape)


def float64_of(parts: np.ndarray) -> np.ndarray:
    """The values that `float32_parts` took apart."""
    return np.ldexp(parts[:3].astype(np.float64).sum(0), parts[3].astype(np.int32))


def float32_parts(values: np.ndarray) -> np.ndarray:
    """float64 values as three float32 that add up to the mantissa exactly, and the exponent.

    MCCL of MindSpore 2.10, and HCCL, sum no float64.
    """
    rest, exponent = np.frexp(values)
    parts = np.zeros((4, values.size), np.float32)
    parts[3] = exponent
    for part in parts[:3]:
        part[:] = rest
        with np.errstate(invalid="ignore"):  # infinity less infinity
            rest = np.where(np.isfinite(part), rest - part, 0.0)
    return parts


def sum_and_scatter(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """This rank's part, along axis 0, of the sum of the ranks' tensors.

    MindSpore has no ReduceScatter on the CPU: there the whole sum is made and cut, which sends
    twice as much. The other branch cannot run in CI.
    """
    if is_simulated(group):
        count(group, tensor, (group.size - 1) / group.size)
        return own_part(group, tensor)
    if group.size > 1 and mindspore.get_context("device_target") != "CPU":
        return ops.ReduceScatter(group=group.name)(tensor)
    return own_part(group, sum_tensor(group, tensor))


def own_part(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor whose axis 0 is cut over the ranks of a group.

    A copy: a view would hold the whole tensor, and operators that write in place miss its memory.
    """
    rows = tensor.shape[0] // group.size
    return tensor[group.index * rows : (group.index + 1) * rows].copy()


def send_recv(pair: ProcessGroup, sent: Tensor | None, empty: Tensor | None) -> Tensor | None:
    """Send a tensor to the other rank of a pair, receive one of it, or both in one message.

    MCCL's collectives only sum: on the CPU it is a sum with zeros, of two slots when both send. The
    branch for Ascend cannot run in CI.

    Args:
        pair: two ranks; what one of them sends the other must receive.
        sent: None where nothing is to be sent.
        empty: zeros of the shape and dtype that is received; None where nothing is.

    Returns:
        What the other rank sent, if `empty` was given.
    """
    if is_simulated(pair):
        if sent is not None:
            count(pair, sent, 1)
        return empty
    if mindspore.get_context("device_target") != "CPU":
        return _send_and_receive(pair, sent, empty)
    if sent is None or empty is None:
        total = sum_tensor(pair, empty if sent is None else sent)
        return total if sent is None else None
    slots = (sent, empty) if pair.index == 0 else (empty, sent)
    return sum_tensor(pair, ops.stack(slots))[1 - pair.index]


def _send_and_receive(
    pair: ProcessGroup, sent: Tensor | None, empty: Tensor | None
) -> Tensor | None:
    from mindspore.mint import distributed  # noqa: PLC0415 - with the connection only

    other = pair.ranks[1 - pair.index]

    def send() -> None:
        if sent is not None:
            distributed.isend(sent, other, group=pair.name).wait()

    def receive() -> None:
        if empty is not None:
            distributed.irecv(empty, other, group=pair.name).wait()

    # The lower rank sends first: two that both waited for their message to be taken would hang.
    for move in (send, receive) if pair.index == 0 else (receive, send):
        move()
    return empty


def gather_tensors(group: ProcessGroup, tensor: Tensor) -> list[Tensor]:
    """The ranks' tensors of one shape, in the order of ranks."""
    if group.size == 1:
        return [tensor]
    if is_simulated(group):
        count(group, tensor, group.size - 1)
        return [tensor] * group.size
    from mindspore.mint import distributed  # noqa: PLC0415 - with the connection only

    gathered = [ops.zeros_like(tensor) for _ in group.ranks]
    distributed.all_gather(gathered, tensor, group=group.name)
    return gathered


def gather_objects(group: ProcessGroup, value: Any) -> list[Any]:
    """The ranks' values (of plain Python types), in order. Of all ranks: waits for the slowest."""
    if group.size == 1:
        return [value]
    if group.kind == "world":
        wait_for_all()
    from mindspore.mint import distributed  # noqa: PLC0415 - with the connection only

    gathered: list[Any] = [None] * group.size
    distributed.all_gather_object(gathered, value, group=group.name)
    return gathered
