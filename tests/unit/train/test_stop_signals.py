"""Signals during training: the first is noted, a second Ctrl-C interrupts."""

import os
import signal

import pytest

from mixtral_ms.train.stop_signals import StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_number is None
        send(number)
        assert stop.signal_number == number
    assert signal.getsignal(number) == before


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
