"""scripts/msrun_launcher.sh as a user types it, on real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import heeding_signals

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
MSRUN = Path(sys.executable).with_name("msrun")
LOGS = ("logs", "False", "30")

# What a worker does after its first lines; the scheduler waits as it does in a real run.
PRELUDE = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK_ID"])
if os.environ["MS_ROLE"] == "MS_SCHED":
    while os.path.exists("scheduler_waits"):
        time.sleep(0.05)
    sys.exit()
with open(f"pid_{rank}", "w") as file:
    file.write(str(os.getpid()))
"""
ALL_REDUCE = """
import os, signal, sys
import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.communication import get_rank, init
ms.set_context(mode=ms.GRAPH_MODE)
ms.set_device("CPU")
init()

class Sum(nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, x):
        return self.all_reduce(x)

total = Sum()
mine = ms.Tensor(np.full(3, 10.0 ** get_rank(), np.float32))
print("total", total(mine).asnumpy().tolist(), flush=True)
if sys.argv[1:] == [str(get_rank())]:
    os.kill(os.getpid(), signal.SIGKILL)
if len(sys.argv) > 1:
    total(mine)  # the one that is left waits for the other here
"""


@pytest.fixture
def program(tmp_path):
    """Writes worker.py: the prelude and what a test adds."""

    def write(body, prelude=PRELUDE):
        (tmp_path / "worker.py").write_text(prelude + body)

    return write


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


_started = []


@pytest.fixture(autouse=True)
def nothing_stays():
    """Ends the launchers of a test that failed; their workers die with them."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()


def start(folder, *arguments, **environment):
    with heeding_signals():
        process = subprocess.Popen(
            ["bash", str(LAUNCHER), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHON": sys.executable, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    _started.append(process)
    return process


def launch(folder, *arguments, timeout=60, **environment):
    process = start(folder, *arguments, **environment)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen"
        time.sleep(0.02)


def pids(folder, count):
    """Of the workers, once each has written its own."""
    files = [folder / f"pid_{rank}" for rank in range(count)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def processes_in(folder):
    """All that run with `folder` as their working directory."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            here = Path(os.readlink(link)) == folder
        except OSError:
            continue
        if here and alive(int(link.parent.name)):
            found.append(int(link.parent.name))
    return found


def dumped(folder, what):
    return {file.name: json.loads(file.read_text()) for file in sorted(folder.glob(f"{what}_*"))}


DUMP = """
import json, os, sys
name = f"{os.environ['MS_ROLE']}_{os.environ['RANK_ID']}"
given = {k: v for k, v in os.environ.items() if k.startswith(("MS_", "RANK_", "DEVICE_ID"))}
with open(f"env_{name}", "w") as file:
    json.dump([sys.argv, given], file)
"""


@pytest.mark.slow
def test_processes_get_what_msrun_gives_them(tmp_path, program, port):
    """Order, environment and number of processes, against MindSpore's own launcher."""
    program(DUMP, prelude="")
    done = launch(tmp_path, "worker.py --a 'b c'", "4", "2", "127.0.0.1", port, "0", *LOGS)
    assert done.returncode == 0, done.stderr
    ours = dumped(tmp_path, "env")
    for file in tmp_path.glob("env_*"):
        file.unlink()
    subprocess.run(
        [
            *(str(MSRUN), "--worker_num=4", "--local_worker_num=2", "--master_addr=127.0.0.1"),
            *(f"--master_port={port}", "--node_rank=0", "--log_dir=theirs", "--join=True"),
            *("--cluster_time_out=30", "worker.py", "--a", "b c"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{MSRUN.parent}:{os.environ['PATH']}"},
        capture_output=True,
        timeout=100,
        check=True,
    )
    assert set(ours) == {"env_MS_SCHED_0", "env_MS_WORKER_0", "env_MS_WORKER_1"}
    assert ours == dumped(tmp_path, "env")
    names = {file.name for file in (tmp_path / "logs").iterdir()}
    assert names == {file.name for file in (tmp_path / "theirs").iterdir()}


@pytest.mark.parametrize(
    "order, words",
    [
        ('worker.py --predict_data "I love Beijing, because"', ["I love Beijing, because"]),
        ("worker.py --predict_data 'it''s' \\\n  --x \"a \\\"b\\\" $WHO\"", ["its", 'a "b" me']),
        ("python worker.py --predict_data 'a; b | c (d) #' # a comment", ["a; b | c (d) #"]),
        ("python3 worker.py --predict_data '' --x '*'", ["", "*"]),
    ],
)
def test_words_are_those_of_a_shell(tmp_path, program, port, order, words):
    program("print(json.dumps(sys.argv))")
    done = launch(tmp_path, order, "1", port, *LOGS, WHO="me")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got[0] == "worker.py" and got[2::2] == words


def test_output_of_the_first_rank_and_a_log_of_each(tmp_path, program, port):
    program("print('this is', rank, flush=True)\nprint('no newline', end='')")
    done = launch(tmp_path, "worker.py", "3", port, "deep/logs", "False", "30", MF_LOG_SUFFIX="x")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("this is 0\nno newline")
    for rank in range(3):
        log = tmp_path / f"deep/logs_x/worker_{rank}.log"
        assert log.read_text() == f"this is {rank}\nno newline"


def test_join_shows_every_rank(tmp_path, program, port):
    program("print('this is', rank)")
    done = launch(tmp_path, "worker.py", "2", port, "logs", "True", "30")
    assert done.returncode == 0
    assert {"[rank 0] this is 0", "[rank 1] this is 1"} <= set(done.stdout.splitlines())


def test_defaults_are_the_reference_s(tmp_path, program):
    program("print(json.dumps(dict(os.environ)))")
    done = launch(tmp_path, "worker.py")
    assert done.returncode == 0, done.stderr
    environment = json.loads(done.stdout.splitlines()[-1])
    assert environment["MS_WORKER_NUM"] == environment["RANK_SIZE"] == "8"
    assert environment["MS_SCHED_HOST"] == "127.0.0.1"
    assert environment["MS_SCHED_PORT"] == "8118" and environment["MS_TOPO_TIMEOUT"] == "7200"
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert environment["LOG_MF_PATH"] == str(tmp_path / "output/log")
    assert len(list((tmp_path / "output/msrun_log").glob("worker_[0-7].log"))) == 8


def test_a_failure_is_shown_and_ends_all(tmp_path, program, port):
    (tmp_path / "scheduler_waits").touch()
    program(
        "subprocess.Popen(['sleep', '300'])\n"
        "if rank == 1:\n    print('x\\n' * 100)\n    raise ValueError('the data is damaged')\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(300)"
    )
    done = launch(tmp_path, "worker.py", "3", port, *LOGS)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "failed: rank 1 ended with status 1; its log is logs/worker_1.log"
    assert lines[1] == "  | Traceback (most recent call last):"
    assert lines[-2] == "  | ValueError: the data is damaged"
    assert lines[-1] == "ending the other 2 here"
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("status", [3, 77])
def test_the_status_is_the_worker_s(tmp_path, program, port, status):
    program(f"print('error: no such file')\nsys.exit({status} if rank == 0 else 0)")
    done = launch(tmp_path, "worker.py", "2", port, *LOGS)
    assert done.returncode == status
    assert "error: no such file" in done.stdout
    assert f"rank 0 ended with status {status}" in done.stderr
    assert "error: no such file" not in done.stderr  # it is on the terminal already


def test_a_failed_scheduler_is_said_when_no_worker_failed(tmp_path, program, port):
    program(
        "time.sleep(300)",
        prelude=PRELUDE.replace("    sys.exit()", "    sys.exit('cannot listen')"),
    )
    done = launch(tmp_path, "worker.py", "2", port, *LOGS)
    assert done.returncode == 1
    assert "the scheduler ended with status 1" in done.stderr and "cannot listen" in done.stderr
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_workers_save_and_ends_all(tmp_path, program, port, number):
    (tmp_path / "scheduler_waits").touch()
    program(
        "def save(*_):\n    print('saved', flush=True)\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(300)"
    )
    process = start(tmp_path, "worker.py", "2", port, *LOGS)
    logs = [tmp_path / f"logs/worker_{rank}.log" for rank in range(2)]
    wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert signal.Signals(number).name in err and "saved" in out
    assert all("saved" in log.read_text() for log in logs)
    assert processes_in(tmp_path) == []


def test_workers_that_ignore_sigterm_are_killed(tmp_path, program, port):
    program(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(300)"
    )
    process = start(tmp_path, "worker.py", "1", port, *LOGS, MSRUN_GRACE="0.5")
    log = tmp_path / "logs/worker_0.log"
    wait_for(lambda: log.exists() and "on" in log.read_text())
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert processes_in(tmp_path) == []


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path, program, port):
    (tmp_path / "scheduler_waits").touch()
    program("time.sleep(300)")
    process = start(tmp_path, "worker.py", "2", port, *LOGS)
    pids(tmp_path, 2)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: processes_in(tmp_path) == [])


def test_time_limit(tmp_path, program, port):
    (tmp_path / "scheduler_waits").touch()
    program("time.sleep(300)")
    done = launch(tmp_path, "worker.py", "2", port, *LOGS, MSRUN_TIME_LIMIT="1")
    assert done.returncode == 124 and "MSRUN_TIME_LIMIT 1 s" in done.stderr
    assert processes_in(tmp_path) == []


def test_cores_are_shared_out_and_hccl_waits(tmp_path, program, port, monkeypatch):
    """Both ranks get other cores, of equal number; waits are those of the environment if it has."""
    # MindSpore puts its own there in each process that imports it, as another test may have
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    names = "('HCCL_CONNECT_TIMEOUT', 'HCCL_EXEC_TIMEOUT')"
    program(
        "print('cores', *sorted(os.sched_getaffinity(0)))\n"
        f"print('waits', *(os.environ[name] for name in {names}))\n"
    )
    bound = {"MSRUN_BIND_CORE": "True", "HCCL_EXEC_TIMEOUT": "600"}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        refused = launch(tmp_path, "worker.py", "2", port, *LOGS, **bound)
        assert refused.returncode == 2 and "cannot have a core each" in refused.stderr
        return
    assert launch(tmp_path, "worker.py", "2", port, *LOGS, **bound).returncode == 0
    logs = [(tmp_path / "logs" / f"worker_{rank}.log").read_text() for rank in (0, 1)]
    share = len(cores) // 2
    for log, own in zip(logs, (cores[:share], cores[share : 2 * share]), strict=True):
        assert f"cores {' '.join(map(str, own))}\nwaits 7200 600\n" in log
    wrong = launch(tmp_path, "worker.py", "2", port, *LOGS, MSRUN_BIND_CORE="8")
    assert wrong.returncode == 2 and "MSRUN_BIND_CORE '8' must be True or False" in wrong.stderr


def test_a_port_in_use_is_named(tmp_path, program):
    program("")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = launch(tmp_path, "worker.py", "2", port, *LOGS)
    assert done.returncode == 2
    assert f"MASTER_PORT {port}: Address already in use on 127.0.0.1" in done.stderr
    assert not list(tmp_path.glob("pid_*"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "0 arguments given; there must be 1, 2, 6 or 9"),
        (("worker.py", "2", "8118"), "3 arguments given"),
        (("worker.py it's", "2"), "EXECUTE_ORDER must be one command"),
        (("worker.py; date", "2"), "EXECUTE_ORDER must be one command"),
        (("", "2"), "EXECUTE_ORDER must be one command"),
        (("missing.py", "2"), "'missing.py' is not a file"),
        (("worker.py", "two"), "WORKER_NUM 'two' must be a whole number of at least 1"),
        (("worker.py", "0"), "WORKER_NUM '0'"),
        (("worker.py", "2", "80", "l", "False", "9"), "MASTER_PORT '80' must be"),
        (("worker.py", "2", "8118", "l", "maybe", "9"), "JOIN 'maybe' must be True or False"),
        (("worker.py", "2", "8118", "l", "True", "-1"), "CLUSTER_TIME_OUT '-1'"),
        (("worker.py", "2", "8118", "worker.py", "True", "9"), "LOG_DIR 'worker.py' cannot be"),
        (("worker.py", "6", "4", "127.0.0.1", "8118", "0", *LOGS), "not a multiple of"),
        (("worker.py", "4", "2", "127.0.0.1", "8118", "2", *LOGS), "NODE_RANK 2"),
        (("worker.py", "4", "2", "no.such.host.invalid", "8118", "1", *LOGS), "MASTER_ADDR"),
        (("worker.py", "4", "2", "192.0.2.1", "8118", "0", *LOGS), "not an address of this"),
    ],
)
def test_wrong_arguments(tmp_path, program, arguments, said):
    program("")
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("pid_*"))


def test_a_mistake_that_all_ranks_find_is_said_once(tmp_path, program, port):
    program("time.sleep(0 if rank else 1)\nprint('error: no such key')\nsys.exit(2)")
    done = launch(tmp_path, "worker.py", "2", port, *LOGS)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: no such key") == 1
    assert "failed: rank 0 ended with status 2" in done.stderr


def test_a_mistake_of_one_rank_is_shown(tmp_path, program, port):
    program("if rank == 1:\n    print('error: no such file')\n    sys.exit(2)\ntime.sleep(300)")
    done = launch(tmp_path, "worker.py", "2", port, *LOGS)
    assert done.returncode == 2
    assert "failed: rank 1 ended with status 2" in done.stderr
    assert "  | error: no such file" in done.stderr


def test_what_mindspore_logs_at_its_end_is_not_shown(tmp_path, program, port):
    line = "[INFO] DISTRIBUTED(1,2,python): Event base dispatch success!"
    program(f"print('kept', flush=True)\nprint({line!r})\nsys.exit(1)")
    done = launch(tmp_path, "worker.py", "1", port, *LOGS)
    assert done.stdout.endswith("kept\n") and "dispatch" not in done.stderr


def test_help(tmp_path):
    done = launch(tmp_path, "--help")
    assert done.returncode == 0 and "EXECUTE_ORDER WORKER_NUM MASTER_PORT LOG_DIR" in done.stdout


@pytest.mark.slow
def test_two_machines_reduce_over_mccl(tmp_path, program, port):
    """Both commands of a run on two machines, which are this one."""
    program(ALL_REDUCE, prelude="")
    common = ("worker.py", "2", "1", "127.0.0.1", port)
    nodes = [start(tmp_path, *common, rank, f"logs_{rank}", "False", "90") for rank in ("1", "0")]
    for process, rank in zip(nodes, (1, 0), strict=True):
        out, err = process.communicate(timeout=110)
        assert process.returncode == 0, err
        assert "total [11.0, 11.0, 11.0]" in out.splitlines()
        logs = {file.name for file in (tmp_path / f"logs_{rank}").iterdir()}
        assert logs == {f"worker_{rank}.log"} | (set() if rank else {"scheduler.log"})
    assert processes_in(tmp_path) == []


@pytest.mark.slow
def test_a_killed_worker_ends_the_one_that_waits_for_it(tmp_path, program, port):
    program(ALL_REDUCE, prelude="")
    done = launch(tmp_path, "worker.py 1", "2", port, "logs", "False", "90", timeout=110)
    assert done.returncode == 128 + signal.SIGKILL
    assert "failed: rank 1 was ended by SIGKILL (status 137)" in done.stderr
    assert "total [11.0, 11.0, 11.0]" in done.stdout
    assert processes_in(tmp_path) == []
