"""Which device a process takes, and when; what MindSpore is told stands in for the devices."""

import os

import mindspore
import pytest
from mindspore import communication

from mixtral_ms.config import RunConfig
from mixtral_ms.config.sections.parallel_section import HcclBuffers, ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.graphs.pretended_device import PretendedAscend
from mixtral_ms.infer import load_model as load
from mixtral_ms.parallel.comm import device
from mixtral_ms.parallel.comm import process_groups as connection
from mixtral_ms.parallel.comm.device import set_up_device
from mixtral_ms.parallel.comm.launched import HCCL_WAITS


@pytest.fixture
def told(monkeypatch):
    """What MindSpore is told, in order; as it does, it refuses to hear of determinism twice."""
    said = []

    def set_deterministic(value):
        if any(name == "set_deterministic" for name, *_ in said):
            raise RuntimeError("can not be set repeatedly.\n- C++ call stack")
        said.append(("set_deterministic", value))

    def heard(name):
        return lambda *given, **named: said.append((name, *given, *named.items()))

    for name in ("set_device", "set_context"):
        monkeypatch.setattr(mindspore, name, heard(name))
    for name in ("set_cpu_affinity", "launch_blocking"):
        monkeypatch.setattr(mindspore.runtime, name, heard(name))
    monkeypatch.setattr(mindspore, "set_deterministic", set_deterministic)
    monkeypatch.setattr(connection, "connect", lambda _: said.append(("connect",)))
    for name in ("DEVICE_ID", "MS_ROLE", "MS_WORKER_NUM", *HCCL_WAITS):
        monkeypatch.delenv(name, raising=False)
    device._take.cache_clear()
    yield said
    device._take.cache_clear()


@pytest.fixture
def config():
    config = RunConfig()
    config.context.device_target, config.context.device_id = "Ascend", 5
    return config


def launch(monkeypatch):
    """The environment of a launcher's only process."""
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "1")


@pytest.mark.parametrize(("launched", "taken"), [(False, 5), (True, 3)])
def test_the_launchers_device_is_taken_under_a_launcher(launched, taken, told, config, monkeypatch):
    monkeypatch.setenv("DEVICE_ID", "3")  # a shell may have it from elsewhere
    if launched:
        launch(monkeypatch)
    set_up_device(config)
    assert ("set_device", "Ascend", taken) in told


@pytest.mark.parametrize(("given", "lines"), [("3", 1), ("x", 1), ("5", 0)])
def test_a_device_that_no_launcher_gave_is_said(told, config, monkeypatch, caplog, given, lines):
    monkeypatch.setenv("DEVICE_ID", given)
    with caplog.at_level("INFO", "mixtral_ms"):
        set_up_device(config)
    said = f"DEVICE_ID {given} of the environment has no effect without a launcher"
    assert caplog.text.count(said) == lines


def test_ranks_that_answer_have_their_devices_before_they_meet(told, config, monkeypatch):
    launch(monkeypatch)
    monkeypatch.setenv("DEVICE_ID", "3")
    load._meet(config)
    assert told.index(("set_device", "Ascend", 3)) < told.index(("connect",))


def test_a_second_trainer_in_one_process(told, config):
    set_up_device(config)
    set_up_device(config)
    assert told.count(("set_device", "Ascend", 5)) == 1
    config.context.deterministic = "ON"
    with pytest.raises(UserError, match=r"cannot be used: can not be set repeatedly\. \(set"):
        set_up_device(config)


def test_a_device_that_is_not_there(told, config, monkeypatch):
    def missing(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(mindspore, "set_device", missing)
    with pytest.raises(UserError, match="Ascend, device 5, .* no such device .*device_target CPU"):
        set_up_device(config)
    assert "set_deterministic" not in {name for name, *_ in told}


def test_a_session_that_has_its_device_is_left_alone(told, config):
    config.context.device_target = "CPU"  # as in this process, where operators may have run
    set_up_device(config)
    assert {name for name, *_ in told} == {"set_context"}


def test_a_device_is_told_what_the_yaml_says(told, config):
    context = config.context
    context.jit_config.jit_level, context.exec_order = "O1", "dfs"
    context.memory_optimize_level, context.mempool_block_size = "O1", "2GB"
    context.ascend_config.precision_mode = "must_keep_origin_dtype"
    context.ascend_config.matmul_allow_hf32 = False
    context.affinity_cpu_list, context.pynative_synchronize = {"device5": ["0-9"]}, True
    context.save_graphs, context.save_graphs_path = True, "/graphs"
    set_up_device(config)
    assert told[1] == ("set_context", ("save_graphs", True), ("save_graphs_path", "/graphs"))
    settings = dict(one[1] for one in told[2:] if one[0] == "set_context")
    assert settings == {
        "max_device_memory": "1024GB",
        "memory_optimize_level": "O1",
        "mempool_block_size": "2GB",
        "jit_config": {"jit_level": "O1"},
        "exec_order": "dfs",
        "ascend_config": {"precision_mode": "must_keep_origin_dtype", "matmul_allow_hf32": False},
    }
    assert ("set_cpu_affinity", True, {"device5": ["0-9"]}) in told
    assert ("launch_blocking",) in told


def test_what_is_left_empty_is_mindspores_own(told, config):
    set_up_device(config)
    settings = dict(one[1] for one in told[1:] if one[0] == "set_context")
    assert settings.keys() == {"max_device_memory", "memory_optimize_level", "jit_config"}
    assert not {"set_cpu_affinity", "launch_blocking"} & {name for name, *_ in told}


def test_a_cpu_is_told_none_of_it_and_the_log_says_so(told, config, caplog):
    config.context.device_target = "CPU"
    set_up_device(config)
    assert "has no effect" not in caplog.text
    config.context.jit_config.jit_level, config.context.exec_order = "O1", "dfs"
    config.context.ascend_config.jit_compile = True
    with caplog.at_level("INFO", "mixtral_ms"):
        set_up_device(config)
    for key in ("exec_order dfs", "jit_config.jit_level O1", "ascend_config.jit_compile True"):
        assert f"context.{key} has no effect on CPU" in caplog.text
    assert [one[1] for one in told if one[0] == "set_context"] == [("mode", 0)] * 2


@pytest.mark.parametrize("own", [None, "300"])
def test_ranks_wait_for_slow_ones_unless_the_environment_says_less(told, config, monkeypatch, own):
    launch(monkeypatch)
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "1")  # so that what is set here goes with the test
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    for name in HCCL_WAITS:
        os.environ.pop(name)
        if own:
            os.environ[name] = own
    set_up_device(config)
    assert {name: os.environ[name] for name in HCCL_WAITS} == (
        dict.fromkeys(HCCL_WAITS, own) if own else HCCL_WAITS
    )


def test_groups_have_the_buffers_that_are_asked_for(monkeypatch, caplog):
    """Of two data-parallel ranks on two stages; the exchange has the ranks of `tokens`."""
    groups = {}

    def create_group(_name, ranks, options=None):
        groups[tuple(ranks)] = options and options.hccl_config["hccl_buffer_size"]

    launched = {"MS_WORKER_NUM": "4", "RANK_ID": "1", "MS_ROLE": "MS_WORKER"}
    for name, value in {**launched, "MS_SCHED_HOST": "here", "MS_SCHED_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(communication, "init", lambda _: None)
    monkeypatch.setattr(communication, "create_group", create_group)
    grid = ParallelConfig(data_parallel=2, pipeline_stage=2, expert_parallel=2)
    grid.hccl_buffer_size = HcclBuffers(tokens=100, exchange=50, pair=32)
    with PretendedAscend(1).in_place():
        connection.connect(grid)
    assert groups == {(0, 1): 100, (1, 3): 32}
    assert "hccl_buffer_size.exchange has no effect: its ranks are those of tokens" in caplog.text
