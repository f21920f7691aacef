"""The first signal stops the run after its step, and a second one exits at once.

Ranks that stop together are in tests/faults.
"""

import os
import signal
import time
from contextlib import contextmanager, suppress

import pytest

from switchtitan.training import signals as signals_module
from switchtitan.training.signals import ExitNow, StopSignals
from switchtitan.training.stop import RunStop, Stopped


@pytest.fixture(autouse=True)
def default_handlers():
    """In the background, a shell starts programs that ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def wait_until(claim):
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send_and_wait(*numbers, pause_s=0.2):
    """Sends signals, and waits longer than it takes until the last one raises."""
    for number in numbers:
        send(number)
        time.sleep(pause_s)
    time.sleep(2)


@contextmanager
def single_rank(grace_s=60.0):
    with StopSignals() as signals, RunStop(signals, None, grace_s=grace_s, timeout_s=60) as stop:
        yield signals, stop


def take_steps(stop, during, num_steps=100):
    """Takes steps until the stop; returns their number."""
    step = 0
    with suppress(Stopped), stop.steps(lambda: "resumes from there"):
        for step in range(num_steps):
            during(step)
            stop.note_step()
            number = stop.is_due()
            if number is not None:
                assert number == signal.SIGTERM
                raise Stopped(number)
    return step + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_outside_of_steps_a_signal_interrupts_once(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.add(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            send_and_wait(number)
        assert interrupt.value.args == (number,)
        # Of the same action: it must not interrupt what the first one has started.
        send(number)
        time.sleep(0.2)
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored_unless_a_launcher_sends_it():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals():
        send(signal.SIGHUP)
        time.sleep(0.1)
    with StopSignals(is_launched=True), pytest.raises(KeyboardInterrupt):
        send_and_wait(signal.SIGHUP)


def test_the_step_under_way_is_the_last_one():
    with single_rank() as (_, stop):
        during = {7: lambda: (send(), time.sleep(0.2))}
        assert take_steps(stop, lambda step: during.get(step, tuple)()) == 8


def test_a_signal_before_the_first_step_is_done_exits_at_once():
    with single_rank() as (_, stop):
        with pytest.raises(ExitNow) as ending:
            take_steps(stop, lambda step: send_and_wait(signal.SIGTERM))
        assert ending.value.status == 143


def test_a_signal_before_the_steps_whose_interrupt_is_swallowed_exits_at_their_start():
    with single_rank() as (signals, stop):
        with suppress(KeyboardInterrupt):
            send_and_wait(signal.SIGTERM)
        wait_until(lambda: signals.received is not None)
        with pytest.raises(ExitNow) as ending:
            take_steps(stop, lambda step: time.sleep(0.1), num_steps=10)
    assert ending.value.status == 143


def test_a_signal_after_the_last_step_interrupts():
    with single_rank() as (signals, stop):

        def send_in_last(step):
            if step == 1:
                stop.is_due = lambda: None
                send()
                wait_until(lambda: signals.received is not None)

        with pytest.raises(KeyboardInterrupt):
            take_steps(stop, send_in_last, num_steps=2)


def test_the_end_of_the_grace_period_abandons_the_save():
    with single_rank(grace_s=0.5) as (_, stop):
        with pytest.raises(ExitNow, match="resumes from there") as ending:
            take_steps(stop, lambda step: send_and_wait(signal.SIGTERM) if step else None)
        assert ending.value.status == 5


def test_a_second_signal_exits_at_once_unless_it_is_of_the_same_action(monkeypatch):
    monkeypatch.setattr(signals_module, "SAME_ACTION_S", 0.5)
    numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    with single_rank() as (_, stop):
        with pytest.raises(ExitNow) as ending:
            take_steps(stop, lambda step: send_and_wait(*numbers) if step else None)
        assert ending.value.status == 130
