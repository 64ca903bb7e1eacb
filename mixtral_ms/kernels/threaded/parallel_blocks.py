"""What the numpy kernels share: threads, matrix products and buffers.

As in native/common.hpp, a task is a block small enough that the elementwise work between two
products finds it in the cache, and its products run on the task's own thread, by the oneDNN that
MindSpore has loaded. numpy's BLAS has threads of its own, which all tasks would wait for.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_NO_LOAD = getattr(os, "RTLD_NOLOAD", 0)
_FLOAT = np.dtype(np.float32)


def parallel_for(body: Callable, tasks: Iterable) -> None:
    """Call body(task) for all tasks, on as many threads as the process may use cores."""
    tasks = list(tasks)
    waiting = iter(tasks)  # its next() is atomic

    def work() -> None:
        # What overflows is infinite, and the overflow check sees it. The setting is the thread's.
        with np.errstate(all="ignore"):
            for task in waiting:
                body(task)

    others = [_threads().submit(work) for _ in range(min(_cores(), len(tasks)) - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), thread_name_prefix="numpy-kernel")


if hasattr(os, "register_at_fork"):  # threads stay behind in the parent
    os.register_at_fork(after_in_child=_threads.cache_clear)


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, *, add: bool = False) -> np.ndarray:
    """out = a b, or out += a b; matrices in float32, each as it is or as the transpose of such."""
    function = _sgemm()
    (m, n), k = out.shape, a.shape[1]
    if function is None or m * n * k == 0:
        if add:
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        return out
    a_order, a_at, a_row = _blas(a)
    b_order, b_at, b_row = _blas(b)
    _, out_at, out_row = _blas(out)
    beta = 1.0 if add else 0.0
    if function(
        a_order, b_order, m, n, k, 1.0, a_at, a_row, b_at, b_row, beta, out_at, out_row, None
    ):
        raise RuntimeError(f"oneDNN refused the product of {a.shape} and {b.shape}")
    return out


def _blas(x: np.ndarray) -> tuple[bytes, int, int]:
    """Order, address and distance of rows, as BLAS wants them."""
    row, column = x.strides
    if column == _FLOAT.itemsize or x.shape[1] == 1:
        return b"N", x.__array_interface__["data"][0], max(row // _FLOAT.itemsize, x.shape[1])
    return b"T", x.__array_interface__["data"][0], max(column // _FLOAT.itemsize, x.shape[0])


@functools.cache
def _sgemm() -> Callable | None:
    """oneDNN's product on the calling thread; None where MindSpore brings another one."""
    for name in ("libdnnl.so.3", "libdnnl.so.2"):
        try:
            function = ctypes.CDLL(name, _NO_LOAD | os.RTLD_LAZY).dnnl_threadpool_interop_sgemm
        except (OSError, AttributeError):
            continue
        size, real, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        matrix = (address, size)
        orders = (ctypes.c_char, ctypes.c_char)
        function.argtypes = (
            *(*orders, size, size, size, real),
            *(*matrix, *matrix, real, *matrix, address),
        )
        return function
    return None


class _Buffers:
    """Large float32 arrays that are used again: fresh ones cost a page fault every 4 KB."""

    _LARGE = 1 << 18  # values; smaller ones come from malloc without page faults

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[np.ndarray] = []

    def empty(self, *shape: int) -> np.ndarray:
        """An array that is free again when nothing refers to it or to a view of it."""
        size = int(np.prod(shape))
        if size < self._LARGE:
            return np.empty(shape, _FLOAT)
        with self._lock:
            # One reference in the list, one in the loop, one of getrefcount's own.
            free = [x for x in self._all if x.size >= size and sys.getrefcount(x) == 3]  # noqa: PLR2004
            buffer = min(free, key=len, default=None)
            if buffer is None or buffer.size > 2 * size:
                buffer = np.empty(size, _FLOAT)
                self._all.append(buffer)
            return buffer[:size].reshape(shape)


empty = _Buffers().empty
