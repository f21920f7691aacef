"""The numbers of ranks on which tests of sharding train, and how they are compared."""

import pytest
import torch

from support.ranks import run_rows_on_ranks

# In running order.
LAYOUTS = {
    "two": (2, ()),
    "one": (1, ()),
    "four": (4, ()),
    "two_by_two": (4, ("--parallelism.replicate", "2")),
}
"""Name -> number of ranks, and arguments of the run."""
RELATIVE_LOSS_TOLERANCE = 1e-5
"""Sums over ranks have another order; Adam amplifies that for gradients near zero, Muon for
singular values near zero."""


def asked_for(request, rows):
    """Returns those of `rows` that are parameters of the module's selected tests."""
    parameters = {
        value
        for item in request.session.items
        if item.path == request.path and isinstance(item, pytest.Function)
        for value in (item.callspec.params.values() if hasattr(item, "callspec") else ())
        if isinstance(value, str)
    }
    return [row for row in rows if row in parameters]


class Recorded:
    """What rows of a table compute: one session of ranks for many rows, when they are needed.

    Args:
        run: `run(rank, row, folder, session)` returns what rank 0 records.
        sessions: name -> number of ranks and rows, in running order.
    """

    def __init__(self, folder, run, sessions):
        folder.mkdir()
        self._folder, self._run, self._sessions = folder, run, sessions
        self._errors = {}

    def __call__(self, session, row):
        """Returns what a row recorded; fails with its error."""
        for earlier, (num_ranks, rows) in self._sessions.items():
            if earlier not in self._errors:
                self._errors[earlier] = run_rows_on_ranks(
                    num_ranks, _run_and_save, rows, self._run, self._folder, earlier
                )
            if earlier == session:
                break
        assert row not in self._errors[session], f"{session}: {self._errors[session][row]}"
        return torch.load(_file(self._folder, session, row))


def _run_and_save(rank, row, run, folder, session):
    recorded = run(rank, row, folder, session)
    if rank == 0:
        torch.save(recorded, _file(folder, session, row))


def _file(folder, session, row):
    return folder / f"{session} {row}.pt"
