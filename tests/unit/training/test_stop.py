"""The first signal stops the run after its step, and a second one exits at once.

Ranks that stop together are in tests/faults.
"""

import os
import signal
import time
from contextlib import suppress

import pytest
from support.insides import agree_on

from switchtitan.training import stop as stop_module
from switchtitan.training.stop import Stop, Stopped


@pytest.fixture(autouse=True)
def default_handlers():
    """In the background, a shell starts programs that ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def ends(monkeypatch):
    """The messages and statuses with which the process would have ended."""
    found = []
    monkeypatch.setattr(stop_module, "end_now", lambda *end: found.append(end))
    return found


@pytest.fixture
def stop():
    with Stop() as stop:
        yield stop


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def wait_until(claim):
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def take_steps(stop, during, grace_s=60):
    """Takes steps until the stop; returns their number."""
    step = 0
    with suppress(Stopped), stop.steps(lambda: "resumes from there", grace_s):
        for step in range(100):
            during(step)
            stop.raise_if_due()
    return step + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_outside_of_steps_a_signal_interrupts_once(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        stop.add(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            send(number)
        assert interrupt.value.args == (number,)
        # Of the same action: it must not interrupt what the first one has started.
        send(number)
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored_unless_a_launcher_sends_it():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop():
        send(signal.SIGHUP)
    with Stop(is_launched=True), pytest.raises(KeyboardInterrupt):
        send(signal.SIGHUP)


def test_a_forked_process_has_its_own_signals(stop):
    with stop.steps(str, 60):
        child = os.fork()
        if child == 0:
            with suppress(SystemExit):
                send()
                os._exit(4)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        stop.raise_if_due()


def test_the_step_under_way_is_the_last_one_and_has_time_to_be_saved(stop, ends):
    assert take_steps(stop, lambda step: send() if step == 7 else None, grace_s=0.2) == 8
    time.sleep(0.5)
    assert ends == []


def test_a_signal_after_the_last_step_stops_too(stop):
    with pytest.raises(Stopped) as stopped, stop.steps(str, 60):
        send()
    assert stopped.value.args == (signal.SIGTERM,)


def test_an_interrupt_before_the_steps_that_was_swallowed_is_raised_at_their_start(stop):
    with suppress(KeyboardInterrupt):
        send()
    with pytest.raises(KeyboardInterrupt), stop.steps(str, 60):
        pytest.fail("takes steps")


def test_the_end_of_the_grace_period_abandons_the_save(stop, ends):
    take_steps(stop, lambda step: (send(), wait_until(lambda: ends)), grace_s=0.2)
    ((message, status),) = ends
    assert message.startswith("[checkpoint] grace_s = 0.2: ")
    assert message.endswith("resumes from there")
    assert status == 5


def test_a_second_signal_exits_at_once_unless_it_is_of_the_same_action(stop, monkeypatch, ends):
    monkeypatch.setattr(stop_module, "SAME_ACTION_S", 0.5)

    def send_three(step):
        send()
        send()
        assert ends == []
        time.sleep(0.6)
        send(signal.SIGINT)

    take_steps(stop, send_three)
    assert ends == [("stopped at once by SIGINT", 130)]


def test_the_first_signal_of_a_rank_that_another_rank_has_stopped_is_not_a_second_one(
    stop, monkeypatch, ends
):
    """Schedulers reach the machines of a run at different times."""
    monkeypatch.setattr(stop_module, "SAME_ACTION_S", 0.0)
    agree_on(monkeypatch, stop, signal.SIGTERM)
    with suppress(Stopped), stop.steps(str, 60, "a group"):
        with pytest.raises(Stopped):
            stop.raise_if_due()
        send()
        assert ends == []
        send(signal.SIGINT)
        assert ends == [("stopped at once by SIGINT", 130)]
