"""Which device a process takes, and when; what MindSpore is told stands in for the devices."""

import mindspore
import pytest

from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer import load_model as load
from mixtral_ms.parallel.comm import device
from mixtral_ms.parallel.comm import process_groups as connection
from mixtral_ms.parallel.comm.device import set_up_device


@pytest.fixture
def told(monkeypatch):
    """What MindSpore is told, in order; as it does, it refuses to hear of determinism twice."""
    said = []

    def set_deterministic(value):
        if any(name == "set_deterministic" for name, *_ in said):
            raise RuntimeError("can not be set repeatedly.\n- C++ call stack")
        said.append(("set_deterministic", value))

    for name in ("set_device", "set_context"):
        monkeypatch.setattr(
            mindspore, name, lambda *given, name=name, **_: said.append((name, *given))
        )
    monkeypatch.setattr(mindspore, "set_deterministic", set_deterministic)
    monkeypatch.setattr(connection, "connect", lambda _: said.append(("connect",)))
    for name in ("DEVICE_ID", "MS_ROLE"):
        monkeypatch.delenv(name, raising=False)
    device._take.cache_clear()
    yield said
    device._take.cache_clear()


@pytest.fixture
def config():
    config = RunConfig()
    config.context.device_target, config.context.device_id = "Ascend", 5
    return config


@pytest.mark.parametrize(("launched", "taken"), [(False, 5), (True, 3)])
def test_the_launchers_device_is_taken_under_a_launcher(launched, taken, told, config, monkeypatch):
    monkeypatch.setenv("DEVICE_ID", "3")  # a shell may have it from elsewhere
    if launched:
        monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    set_up_device(config)
    assert ("set_device", "Ascend", taken) in told


def test_ranks_that_answer_have_their_devices_before_they_meet(told, config, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
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
