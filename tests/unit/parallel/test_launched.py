"""What a launcher sets, and what another program has left over of it."""

import pytest

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.log import rank_from_environment
from mixtral_ms.parallel.comm.launched import (
    is_launched,
    is_scheduler,
    own_device,
    own_rank,
    started_processes,
)
from mixtral_ms.parallel.comm.process_groups import connect

NAMES = ("MS_ROLE", "MS_WORKER_NUM", "RANK_ID", "DEVICE_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets what is there of NAMES, from `A=1 B=2`, and nothing else of them."""

    def put(text):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for one in text.split():
            monkeypatch.setenv(*one.split("="))

    return put


GOOD = [
    # the environment; launched, how many, which, the device, whose log shows
    ("", False, 1, 0, None, 0),
    ("MS_WORKER_NUM=1", False, 1, 0, None, 0),
    ("RANK_ID=3", False, 1, 0, None, 0),  # the log is not silenced by what is left over
    ("DEVICE_ID=5", False, 1, 0, None, 0),
    ("RANK_ID=x DEVICE_ID=x", False, 1, 0, None, 0),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=1 RANK_ID=3 DEVICE_ID=5", True, 1, 0, 5, 0),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=4 RANK_ID=3 DEVICE_ID=5", True, 4, 3, 5, 3),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=4", True, 4, 0, None, 0),
]


@pytest.mark.parametrize(("text", "launched", "processes", "rank", "device_id", "logs"), GOOD)
def test_what_a_process_takes_from_its_environment(
    environment, text, launched, processes, rank, device_id, logs
):
    environment(text)
    assert (is_launched(), started_processes(), own_rank()) == (launched, processes, rank)
    assert (own_device(), rank_from_environment()) == (device_id, logs)
    assert not is_scheduler()


LEFT_OVER = [
    ("MS_ROLE=MS_SCHED", "MS_ROLE=MS_SCHED, and no MS_WORKER_NUM"),
    ("MS_ROLE=MS_WORKER", "MS_ROLE=MS_WORKER, and no MS_WORKER_NUM"),
    ("MS_ROLE= RANK_ID=0", "MS_ROLE=, and no MS_WORKER_NUM"),
    ("MS_WORKER_NUM=4", "MS_WORKER_NUM=4, and no MS_ROLE"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=", "MS_WORKER_NUM='', which must be a whole number"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=four", "MS_WORKER_NUM='four', which must be a whole"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=0", "MS_WORKER_NUM='0', which must be a whole number"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=-2", "MS_WORKER_NUM='-2', which must be a whole"),
    ("MS_WORKER_NUM=", "MS_WORKER_NUM='', which must be a whole number of at least 1"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=2 RANK_ID=", "RANK_ID='', which must be a whole"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=2 RANK_ID=first", "RANK_ID='first', which must be"),
    ("MS_ROLE=MS_WORKER MS_WORKER_NUM=2 DEVICE_ID=1.5", "DEVICE_ID='1.5', which must be"),
]


@pytest.mark.parametrize(("text", "said"), LEFT_OVER)
def test_what_is_left_over_is_named(environment, text, said):
    environment(text)
    assert rank_from_environment() == 0
    with pytest.raises(UserError) as caught:
        started_processes(), own_rank(), own_device()
    name = said.partition("=")[0]
    assert said in str(caught.value) and f"unset it (unset {name})" in str(caught.value)


@pytest.mark.parametrize("there", [(), ("MS_SCHED_HOST",), ("MS_SCHED_PORT",)])
def test_processes_that_cannot_meet_are_told_so(environment, monkeypatch, there):
    environment("MS_ROLE=MS_WORKER MS_WORKER_NUM=2")
    for name in ("MS_SCHED_HOST", "MS_SCHED_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in there:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match="MS_WORKER_NUM=2, and no MS_SCHED_") as caught:
        connect(ParallelConfig(data_parallel=2))
    assert not any(f"no {name}" in str(caught.value) for name in there)


def test_a_scheduler_says_that_it_computes_nothing(environment, capsys):
    environment("MS_ROLE=MS_SCHED MS_WORKER_NUM=1")
    with pytest.raises(SystemExit) as caught:
        connect(ParallelConfig())
    assert caught.value.code == 0
    assert "MS_ROLE is MS_SCHED" in capsys.readouterr().err
