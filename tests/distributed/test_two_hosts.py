"""Two hosts with addresses of their own: network namespaces joined by a cable."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.distributed import ROOT, WORKER, free_port

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and the command ip (iproute2)",
    ),
]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SECONDS = 240


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts():
    """Names of two network namespaces that reach each other, and nothing else."""
    names = [f"host{i}-{os.getpid()}" for i in range(2)]
    cables = [f"cable{i}-{os.getpid() % 10000}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for device in ("lo", cable):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:  # a cable goes with its namespace
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


def launch(hosts: list[str], order: str, folder: Path) -> list[subprocess.Popen]:
    """The command that is typed on each host, with its NODE_RANK."""
    environment = {**os.environ, "PYTHON": sys.executable, "MSRUN_TIME_LIMIT": str(SECONDS)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher, port = str(ROOT / "scripts" / "msrun_launcher.sh"), str(free_port())
    started = []
    for rank, host in enumerate(hosts):
        logs = folder / f"logs_{rank}"
        place = ["2", "1", ADDRESSES[0], port, str(rank), str(logs), "False", "120"]
        with (folder / f"terminal_{rank}").open("wb") as terminal:
            started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, "bash", launcher, order, *place],
                    cwd=folder,
                    env=environment,
                    stdout=terminal,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return started


def terminal(folder: Path, rank: int) -> str:
    return (folder / f"terminal_{rank}").read_text(errors="replace")


def end(launchers: list[subprocess.Popen]) -> None:
    for one in launchers:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)  # its processes die with it
            one.wait(30)


def test_two_hosts_train_as_one(hosts, tmp_path):
    launchers = launch(hosts, f"{WORKER} {tmp_path} --grid dp=2 --steps 2", tmp_path)
    try:
        statuses = [one.wait(SECONDS) for one in launchers]
        assert statuses == [0, 0], terminal(tmp_path, 0) + terminal(tmp_path, 1)
    finally:
        end(launchers)
    ours, theirs = (np.load(tmp_path / f"dropless.rank_{rank}.npz") for rank in range(2))
    assert np.array_equal(ours["losses"], theirs["losses"])
    alone = [sys.executable, str(WORKER), str(tmp_path / "alone"), "--steps", "2"]
    subprocess.run(
        [*alone, "--accumulation", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=SECONDS,
        capture_output=True,
    )
    expected = np.load(tmp_path / "alone" / "dropless.rank_0.npz")
    np.testing.assert_allclose(ours["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(ours["norms"], expected["norms"], rtol=1e-5)


def test_a_host_that_is_gone_ends_the_other(hosts, tmp_path):
    launchers = launch(hosts, f"{WORKER} {tmp_path} --grid dp=2 --steps 100000", tmp_path)
    try:
        time.sleep(5)
        until = time.monotonic() + SECONDS
        while not (tmp_path / "dropless.started").exists():
            assert time.monotonic() < until, terminal(tmp_path, 0) + terminal(tmp_path, 1)
            time.sleep(0.2)
        os.killpg(launchers[1].pid, signal.SIGKILL)
        assert launchers[0].wait(60) != 0
        assert "failed: rank 0" in terminal(tmp_path, 0)
    finally:
        end(launchers)
