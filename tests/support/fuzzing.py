"""Feeds damaged files to a reader: each is read or refused by a `UserError`, and nothing else."""

import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.fault_report import IS_LONG, record
from switchtitan.errors import UserError

_MAX_CPU_S = 20.0


class FuzzError(AssertionError):
    """A damaged file had another outcome than success or a `UserError`."""


def num_cases(long: int, short: int) -> int:
    """The number of cases in the long or in the short form."""
    return long if IS_LONG else short


def fuzz(
    target: str,
    make_case: Callable[[random.Random], object],
    read: Callable[[], object],
    cases: range,
    min_refused: float = 0.3,
) -> Counter[str]:
    """Makes and reads damaged files; returns the numbers of `read` and `refused` ones.

    Args:
        target: what is read, for the report.
        make_case: writes a damaged file. Returns what to show if the case fails.
        read: reads the file.
        cases: seeds; the case of a failure's seed can be run alone.
        min_refused: the least fraction that must be refused, so that a fuzzer whose cases are all
            valid fails.

    Raises:
        FuzzError: lists every kind of failure with its number and first seed; if the message of a
            `UserError` is empty or a traceback; if too few cases are refused.
    """
    outcomes: Counter[str] = Counter()
    failures: dict[str, list[str]] = {}
    for seed in cases:
        case = make_case(random.Random(seed))
        try:
            with limited_cpu_time(_MAX_CPU_S):
                read()
        except UserError as error:
            outcomes["refused"] += 1
            message = str(error)
            if not message.strip() or "Traceback (most recent call last)" in message:
                failures.setdefault("no message", []).append(f"case {seed}: {message!r}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # PanicException of Rust libraries is no Exception
            kind = f"{type(error).__name__} at {_place(error)}"
            shown = f"case {seed}: {str(error)[:300]}; {repr(case)[:300]}"
            failures.setdefault(kind, []).append(shown)
        else:
            outcomes["read"] += 1
    if failures:
        lines = [f"{kind} ({len(all_)} times): {all_[0]}" for kind, all_ in failures.items()]
        raise FuzzError("\n".join([f"{sum(map(len, failures.values()))} failures", *lines]))
    if outcomes["refused"] < min_refused * len(cases):
        raise FuzzError(f"only {outcomes['refused']} of {len(cases)} cases were refused")
    record("fuzzing", target=target, read=outcomes["read"], refused=outcomes["refused"])
    return outcomes


def _place(error: BaseException) -> str:
    """The innermost line of this package that the exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/switchtitan/" in frame.filename]
    return f"{own[-1].filename.rpartition('/switchtitan/')[2]}:{own[-1].lineno}" if own else "tests"


@contextmanager
def limited_cpu_time(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block if it uses more CPU time. A busy machine does not matter."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
