"""Which device a process takes, and when; what MindSpore is told stands in for the devices."""

import mindspore
import pytest

from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer import load
from mixtral_ms.parallel import connection
from mixtral_ms.parallel.device import set_up_device


@pytest.fixture
def told(monkeypatch):
    """What MindSpore is told, in order."""
    said = []
    for name in ("set_device", "set_context", "set_deterministic"):
        monkeypatch.setattr(
            mindspore, name, lambda *given, name=name, **named: said.append((name, *given, named))
        )
    monkeypatch.setattr(connection, "connect", lambda _: said.append(("connect",)))
    monkeypatch.delenv("DEVICE_ID", raising=False)
    return said


@pytest.fixture
def config():
    config = RunConfig()
    config.context.device_target, config.context.device_id = "Ascend", 5
    return config


@pytest.mark.parametrize(("launcher", "device"), [(None, 5), ("3", 3)])
def test_the_launchers_device_comes_before_the_files(launcher, device, told, config, monkeypatch):
    if launcher is not None:
        monkeypatch.setenv("DEVICE_ID", launcher)
    set_up_device(config)
    assert ("set_device", "Ascend", device, {}) in told


def test_ranks_that_answer_have_their_devices_before_they_meet(told, config, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("DEVICE_ID", "3")
    load._meet(config)
    assert told.index(("set_device", "Ascend", 3, {})) < told.index(("connect",))


def test_a_device_that_is_not_there(told, config, monkeypatch):
    def missing(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(mindspore, "set_device", missing)
    with pytest.raises(UserError, match="Ascend, device 5, cannot be used.*--device_target CPU"):
        set_up_device(config)
    assert "set_deterministic" not in {name for name, *_ in told}


def test_a_session_that_has_its_device_is_left_alone(told, config):
    config.context.device_target = "CPU"  # as in this process, where operators may have run
    set_up_device(config)
    assert {name for name, *_ in told} == {"set_context"}
