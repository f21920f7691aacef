"""A launcher's variables: empty ones count as unset, and others must be numbers."""

from collections.abc import Callable

import pytest

from switchtitan.distributed.launcher import (
    is_launched,
    local_rank_from_launcher,
    num_local_ranks_from_launcher,
    num_ranks_from_launcher,
    rank_from_launcher,
)
from switchtitan.errors import EnvironmentMismatchError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def place() -> tuple[bool, int, int, int, int]:
    return (
        is_launched(),
        num_ranks_from_launcher(),
        rank_from_launcher(),
        local_rank_from_launcher(),
        num_local_ranks_from_launcher(),
    )


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    unset = place()
    assert unset == (False, 1, 0, 0, 1)
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert place() == unset


def test_all_ranks_are_local_unless_the_launcher_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in zip(NAMES, ("4", "3", "1", ""), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == (True, 4, 3, 1, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place() == (True, 4, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "value", "read", "at_least"),
    [
        ("WORLD_SIZE", "two", num_ranks_from_launcher, 1),
        ("WORLD_SIZE", "0", num_ranks_from_launcher, 1),
        ("RANK", "-1", rank_from_launcher, 0),
        ("LOCAL_RANK", "1.0", local_rank_from_launcher, 0),
        ("LOCAL_WORLD_SIZE", "0", num_local_ranks_from_launcher, 1),
    ],
)
def test_values_that_are_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], int], at_least: int
) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        EnvironmentMismatchError, match=rf"^{name}={value}: expected an integer >= {at_least}; "
    ):
        read()


@pytest.mark.parametrize(
    ("num_ranks", "expected"), [("", "WORLD_SIZE, which is not set"), ("3", "WORLD_SIZE=3")]
)
def test_a_rank_must_be_below_the_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, num_ranks: str, expected: str
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", num_ranks)
    with pytest.raises(
        EnvironmentMismatchError, match=rf"^RANK=3: expected a rank below {expected};"
    ):
        rank_from_launcher()
