"""Job files of scripts/cluster, with processes of this machine in place of a cluster."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "scripts" / "cluster"
WORKER = """
import json, os, sys, time
names = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "DEVICE_ID")
line = {name: os.environ.get(name) for name in names} | {"words": sys.argv[1:]}
print(json.dumps(line), flush=True)
if line["MS_ROLE"] == "MS_SCHED":
    open("scheduler_has_written", "w").close()
while not os.path.exists("scheduler_has_written"):  # its launcher ends it with the workers
    time.sleep(0.05)
"""
SRUN = """#!/usr/bin/env bash
[ "$1 $2" = "--ntasks-per-node=1 --kill-on-bad-exit=1" ] || exit 9
for node in 0 1; do
  SLURM_NODEID=$node "${@:3}" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""
MSRUN = f"""#!{sys.executable}
import json
from mindspore.parallel.cluster.run import get_args
print(json.dumps(vars(get_args())))
"""


@pytest.fixture
def project(tmp_path):
    """What the job files expect in the project's folder, and programs in place of the cluster's."""
    shutil.copytree(CLUSTER, tmp_path / "scripts/cluster")
    (tmp_path / "scripts/msrun_launcher.sh").write_text(
        f'exec bash {ROOT}/scripts/msrun_launcher.sh "$@"\n'
    )
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "msrun": MSRUN}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(project, **values):
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHON": sys.executable, **values}


def started(logs, count):
    """What the scheduler and each rank were given."""
    lines = [(logs / f"worker_{rank}.log").read_text() for rank in range(count)]
    return [json.loads(line) for line in ((logs / "scheduler.log").read_text(), *lines)]


def check(found, port, words):
    scheduler, *workers = found
    assert scheduler["MS_ROLE"] == "MS_SCHED"
    for rank, one in enumerate(workers):
        assert one == {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": "2",
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": port,
            "MS_NODE_ID": str(rank),
            "DEVICE_ID": "0",
            "words": words,
        }


@pytest.mark.parametrize("file", ["msrun_hosts.sh", "slurm.sbatch"])
def test_bash_reads_it(file):
    subprocess.run(["bash", "-n", CLUSTER / file], check=True)


def test_slurm(project, port):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(project), "DEVICES": "1", "MASTER_PORT": port}
    words = ["--predict_data", "I love Beijing, because; it's", "a|b"]
    command = ["bash", project / "scripts/cluster/slurm.sbatch", "worker.py", *words]
    subprocess.run(command, env=environment(project, **job), check=True, timeout=60)
    check(started(project / "output/msrun_log_7", 2), port, words)
    nothing = subprocess.run(
        command[:2], env=environment(project, **job), capture_output=True, text=True, check=False
    )
    assert nothing.returncode == 2 and "no program" in nothing.stderr


def test_kubernetes(project, port):
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pods, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {one["name"]: one["value"] for one in container["env"]}
    # the pods are as many as the run has hosts, and find the first by the service's name
    assert pods["completions"] == pods["parallelism"] == int(values["HOSTS"])
    assert pods["completionMode"] == "Indexed"
    assert container["resources"]["limits"]["huawei.com/Ascend910"] == int(values["DEVICES"])
    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    assert values["MASTER_ADDR"] == f"{name}-0.{domain}"
    assert pod["subdomain"] == domain
    assert service["spec"]["selector"] == {"job-name": name}
    assert (ROOT / values["ORDER"].split()[2]).is_file()
    values |= {"DEVICES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    values |= {"LOG_DIR": "logs", "ORDER": "worker.py one 'two words'", "MSRUN_BIND_CORE": "False"}
    hosts = [
        subprocess.Popen(
            container["command"],
            cwd=project,
            env=environment(project, **values, JOB_COMPLETION_INDEX=str(index)),
        )
        for index in range(2)
    ]
    assert [host.wait(60) for host in hosts] == [0, 0]
    check(started(project / "logs", 2), port, ["one", "two words"])


@pytest.mark.slow  # MindSpore's own reading of its flags
def test_msrun_takes_the_flags(project):
    command = ["bash", project / "scripts/cluster/msrun_hosts.sh", "1", "worker.py", "--seed", "3"]
    values = {"MASTER_ADDR": "10.0.0.1", "HOSTS": "2"}
    done = subprocess.run(
        command,
        env=environment(project, **values),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    given = json.loads(done.stdout.splitlines()[-1])
    wanted = {
        "worker_num": 16,
        "local_worker_num": 8,
        "master_addr": "10.0.0.1",
        "master_port": 8118,
        "node_rank": 1,
        "cluster_time_out": 7200,
        "bind_core": True,
        "task_script": "worker.py",
        "task_script_args": ["--seed", "3"],
    }
    assert {name: given[name] for name in wanted} == wanted
    missing = subprocess.run(
        command[:4], env=environment(project), capture_output=True, text=True, check=False
    )
    assert missing.returncode != 0 and "address of the host with NODE_RANK 0" in missing.stderr
