"""Two hosts with addresses of their own: network namespaces joined by a cable."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from helpers.distributed import WORKER
from helpers.hosts import SECONDS, HostJobs
from helpers.runs import ROOT, make_run, metrics_of, tiny_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and the command ip (iproute2)",
    ),
]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TWO_ON_TWO = f"4 2 {ADDRESSES[0]} 8118 {{}} output/msrun_log False 300"
"""As in MindFormers' documents, with 2 processes a host in place of 8."""


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


def inside(hosts):
    return [["ip", "netns", "exec", host] for host in hosts]


def worker(hosts, folder, steps):
    """The equality tests' program with one process on each host."""
    order = f"{WORKER} {folder} --grid dp=2 --steps {steps}"
    place = f"2 1 {ADDRESSES[0]} 8118 {{}} logs False 120"
    return HostJobs([folder, folder], order, place, inside(hosts))


def test_two_hosts_train_as_one(hosts, tmp_path):
    with worker(hosts, tmp_path, steps=2) as jobs:
        jobs.finish()
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
    with worker(hosts, tmp_path, steps=100000) as jobs:
        time.sleep(5)
        until = time.monotonic() + SECONDS
        while not (tmp_path / "dropless.started").exists():
            assert time.monotonic() < until, jobs.everything
            time.sleep(0.2)
        os.killpg(jobs.launchers[1].pid, signal.SIGKILL)
        assert jobs.launchers[0].wait(60) != 0
        assert "failed: rank 0" in jobs.text(0)


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the project's, its YAMLs and data made small."""
    for name in ("run_mindformer.py", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    data = tmp_path / "data"
    make_run(data)
    (tmp_path / "dataset_dir").mkdir()
    for one in data.glob("train.mindrecord*"):
        one.rename(tmp_path / "dataset_dir" / one.name)
    configs = tmp_path / "research/mixtral/mixtral_8x7b"
    configs.mkdir(parents=True)
    for kind in ("pretrain", "finetune"):
        tree = {**tiny_config(data), "do_eval": False, "output_dir": f"./output/{kind}"}
        tree["runner_config"] |= {"gradient_accumulation_steps": 1, "max_steps": 3}
        tree["parallel_config"] = {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2}
        (configs / f"{kind}_mixtral-8x7b.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_the_commands_of_both_hosts(hosts, project):
    """MindFormers' commands, typed alike on both hosts: pretraining, then fine-tuning."""
    pretrain = """run_mindformer.py \\
 --config research/mixtral/mixtral_8x7b/pretrain_mixtral-8x7b.yaml \\
 --run_mode train \\
 --use_parallel True \\
 --train_data dataset_dir"""
    finetune = """run_mindformer.py \\
 --config research/mixtral/mixtral_8x7b/finetune_mixtral-8x7b.yaml \\
 --load_checkpoint model_dir \\
 --run_mode finetune \\
 --use_parallel True \\
 --train_data dataset_dir"""
    for kind, order in (("pretrain", pretrain), ("finetune", finetune)):
        folders, launcher = [project, project], "scripts/msrun_launcher.sh"
        with HostJobs(folders, order, TWO_ON_TWO, inside(hosts), launcher) as jobs:
            jobs.finish()
            assert "step 3/3  loss " in jobs.text(0) and "step 3/3" not in jobs.text(1)
        output = project / "output" / kind
        assert [one["step"] for one in metrics_of(output)] == [1, 2, 3]
        (checkpoint,) = (output / "checkpoint").glob("*0000003")
        assert {f"rank_{rank}" for rank in range(4)} <= {one.name for one in checkpoint.iterdir()}
        if kind == "pretrain":
            (project / "model_dir").symlink_to(checkpoint)
    first = {
        kind: metrics_of(project / "output" / kind)[0]["loss"] for kind in ("pretrain", "finetune")
    }
    assert first["finetune"] < first["pretrain"]
