"""The first signal stops the run after its step, and a second one exits at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch.distributed as dist
from support.ranks import run_on_ranks

from switchtitan.distributed.board import Board
from switchtitan.training import signals as signals_module
from switchtitan.training.signals import ExitNow, StopSignals
from switchtitan.training.stop import RunStop, Stopped


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """In the background, a shell starts programs that ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def wait_until(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send_and_wait(*numbers: int, pause_s: float = 0.2) -> None:
    for number in numbers:
        send(number)
        time.sleep(pause_s)
    time.sleep(2)


@contextmanager
def single_rank(grace_s: float = 60) -> Iterator[tuple[StopSignals, RunStop]]:
    with (
        StopSignals() as signals,
        RunStop(signals, None, grace_s=grace_s, timeout_s=60) as stop,
    ):
        yield signals, stop


def take_steps(stop: RunStop, during: Callable[[int], object], num_steps: int = 100) -> int:
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
def test_outside_of_steps_a_signal_interrupts_once(number: int) -> None:
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


def test_an_ignored_signal_stays_ignored_unless_a_launcher_sends_it() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals():
        send(signal.SIGHUP)
        time.sleep(0.1)
    with StopSignals(is_launched=True), pytest.raises(KeyboardInterrupt):
        send_and_wait(signal.SIGHUP)


def test_the_step_under_way_is_the_last_one() -> None:
    with single_rank() as (_, stop):
        during = {7: lambda: (send(), time.sleep(0.2))}
        assert take_steps(stop, lambda step: during.get(step, tuple)()) == 8


def test_a_signal_before_the_first_step_is_done_exits_at_once() -> None:
    with single_rank() as (_, stop):
        with pytest.raises(ExitNow) as ending:
            take_steps(stop, lambda step: send_and_wait(signal.SIGTERM))
        assert ending.value.status == 143


def swallow_an_interrupt(signals: StopSignals, stop: RunStop) -> int:
    """Returns the number of steps after code that ignores the interrupt of a signal before them."""
    with suppress(KeyboardInterrupt):
        send_and_wait(signal.SIGTERM)
    wait_until(lambda: signals.received is not None)
    return take_steps(stop, lambda step: time.sleep(0.1), num_steps=10)


def test_a_signal_before_the_steps_whose_interrupt_is_swallowed_exits_at_their_start() -> None:
    with single_rank() as (signals, stop), pytest.raises(ExitNow) as ending:
        swallow_an_interrupt(signals, stop)
    assert ending.value.status == 143


def test_a_swallowed_interrupt_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""

    def defer(signals: StopSignals, on_stop: Callable[[int], None]) -> None:
        signals._on_stop, signals._exit_at = on_stop, None

    monkeypatch.setattr(StopSignals, "defer", defer)
    with single_rank() as (signals, stop):
        assert swallow_an_interrupt(signals, stop) == 10


def test_a_signal_after_the_last_step_interrupts() -> None:
    with single_rank() as (signals, stop):

        def send_in_last(step: int) -> None:
            if step == 1:
                stop.is_due = lambda: None
                send()
                wait_until(lambda: signals.received is not None)

        with pytest.raises(KeyboardInterrupt):
            take_steps(stop, send_in_last, num_steps=2)


def test_the_end_of_the_grace_period_abandons_the_save() -> None:
    with single_rank(grace_s=0.5) as (_, stop):
        with pytest.raises(ExitNow, match="resumes from there") as ending:
            take_steps(stop, lambda step: send_and_wait(signal.SIGTERM) if step else None)
        assert ending.value.status == 5


def test_a_second_signal_exits_at_once_unless_it_is_of_the_same_action(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals_module, "SAME_ACTION_S", 0.5)
    numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    with single_rank() as (_, stop):
        with pytest.raises(ExitNow) as ending:
            take_steps(stop, lambda step: send_and_wait(*numbers) if step else None)
        assert ending.value.status == 130


def test_a_process_that_is_forked_has_its_own_signals() -> None:
    with single_rank() as (signals, stop), stop.steps(str):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(3))
            time.sleep(5)
            os._exit(4)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(0.2)
        assert signals.received is None


def test_ranks_that_are_steps_apart_stop_after_the_same_step() -> None:
    run_on_ranks(3, _steps_apart)


def _steps_apart(rank: int) -> None:
    board = Board(rank, 3)
    dist.barrier()
    with (
        StopSignals() as signals,
        RunStop(signals, board, grace_s=60, timeout_s=60) as stop,
    ):
        if rank == 1:
            threading.Timer(0.7, send).start()
        # As on GPUs, hosts run ahead by different numbers of steps.
        num_steps = take_steps(stop, lambda step: time.sleep(0.02 * (rank + 1)), 10_000)
        steps = [0] * 3
        dist.all_gather_object(steps, num_steps)
        assert len(set(steps)) == 1, steps
        assert steps[0] > 10
