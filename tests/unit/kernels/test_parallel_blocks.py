"""What the numpy kernels stand on: threads, products by oneDNN, buffers used again."""

import os
import threading

import mindspore  # noqa: F401 - loads the oneDNN that products go to
import numpy as np
import pytest

from mixtral_ms.kernels.threaded import parallel_blocks as numpy_tasks
from mixtral_ms.kernels.threaded.parallel_blocks import empty, matmul, parallel_for

LARGE = 1 << 19  # values; smaller arrays are not kept


@pytest.fixture(params=["oneDNN", "numpy"])
def products(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(numpy_tasks, "_sgemm", lambda: None)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 1, 1), (1, 9, 4), (6, 1, 2), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_matmul_takes_parts_and_transposes(sizes, add):
    m, n, k = sizes
    rng = np.random.default_rng(0)
    a, a_turned = (rng.standard_normal(shape, np.float32) for shape in ((m, k + 2), (k, m + 2)))
    b, b_turned = (rng.standard_normal(shape, np.float32) for shape in ((k, n + 2), (n, k + 2)))
    for left in (a[:, 1 : k + 1], a_turned[:, 1 : m + 1].T):
        for right in (b[:, 1 : n + 1], b_turned[:, 1 : k + 1].T):
            frame = np.ones((m, n + 2), np.float32)
            matmul(left, right, frame[:, 1:-1], add=add)
            expected = left.astype(np.float64) @ right + add
            np.testing.assert_allclose(frame[:, 1:-1], expected, rtol=1e-5, atol=1e-6)
            assert (frame[:, [0, -1]] == 1).all()


def test_every_task_runs_once_and_an_error_comes_back():
    done = []
    parallel_for(done.append, range(100))
    assert sorted(done) == list(range(100))

    def fail(task):
        raise ValueError(f"task {task}")

    with pytest.raises(ValueError, match="task"):
        parallel_for(fail, range(3))
    parallel_for(done.append, ())


def test_a_forked_process_has_threads_of_its_own():
    """Those of the parent do not exist there: waiting for them would never end."""
    parallel_for(lambda _: None, range(4))
    child = os.fork()
    if child == 0:
        both = threading.Barrier(min(2, numpy_tasks._cores()), timeout=20)
        status = 1
        try:
            parallel_for(lambda _: both.wait(), range(both.parties))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_buffer_is_used_again_only_when_nothing_refers_to_it():
    first = empty(2, LARGE)
    address, view = first.ctypes.data, first[1:]
    del first
    assert empty(2, LARGE).ctypes.data != address
    del view
    again = [empty(2, LARGE), empty(2, LARGE)]
    assert address in {one.ctypes.data for one in again}
    assert again[0].ctypes.data != again[1].ctypes.data
