"""Signals during training: the first is noted, a second Ctrl-C interrupts."""

import os
import signal

import pytest

from mixtral_ms.train.stop_signals import StopRequest


def send(number):
    os.kill(os.getpid(), number)


NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.fixture(autouse=True)
def own_handlers():
    """What started the tests may have set others."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    for name in NAMES[2:]:
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("number", [signal.Signals[name] for name in NAMES])
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number is None
        send(number)
        assert stop.signal_number == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.Signals[name] for name in NAMES[2:]])
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_what_nohup_or_the_program_has_set_stays(number, handler):
    signal.signal(number, handler)
    with StopRequest() as stop:
        send(number)
        stop.listen()
        send(number)
        assert stop.signal_number is None
    assert signal.getsignal(number) == handler


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
    with StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.signal_number == signal.SIGINT


def test_listening_again_takes_ctrl_c_back():
    with StopRequest() as stop:
        signal.signal(signal.SIGINT, lambda *_: send(signal.SIGTERM))  # as MindSpore does
        stop.listen()
        send(signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
