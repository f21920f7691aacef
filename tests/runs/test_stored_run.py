"""A run that an earlier version saved is evaluated and resumes; see tests/support/stored_run.py."""

import json
import tarfile
from pathlib import Path

import pytest
from support.stored_run import ARCHIVE, measure


def test_a_stored_run_is_evaluated_and_resumes_to_the_losses_that_it_had(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    expected, found = json.loads(Path("expected.json").read_text()), measure()
    # Sums in another order round by 6e-8, which Adam amplifies in five steps.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["switched"] == expected["switched"]
