"""`switchtitan doctor` finds planted lacks, says what to do, and fails if nothing can train."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run

from switchtitan.cli import doctor_checks
from switchtitan.cli.doctor_checks import MISSING, OK, OPTIONAL, WARNING, Finding
from switchtitan.distributed.limits import num_open_files


def doctor(
    *words: str, limit: int | None = None, **environment: str
) -> tuple[int, dict[str, Finding]]:
    """Runs it in a process of its own; returns its status and its findings by name.

    Args:
        limit: of open files.
        environment: variables to set.
    """

    def lower_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "switchtitan", "doctor", "--json", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        preexec_fn=lower_limit,
    )
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert record["can_train"] == (done.returncode == 0)
    return done.returncode, {found["name"]: Finding(**found) for found in record["findings"]}


def test_a_machine_that_can_run_the_tests_can_train(tmp_path: Path) -> None:
    outcome = run("doctor", "--output-dir", tmp_path / "outputs")
    assert (outcome.status, outcome.errors) == (0, "")
    lines = outcome.output.splitlines()
    assert lines.pop() == "training works here"
    assert {line.split()[0] for line in lines} <= {OK, OPTIONAL, WARNING, MISSING, "->"}
    for name in ("Python", "torch", "cores", "bfloat16", "GPU", "outputs", "temp", "file locks"):
        assert any(name in line for line in lines)
    assert "hub" not in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_found_and_training_works_without(tmp_path: Path) -> None:
    status, found = doctor("--output-dir", str(tmp_path), PATH=str(tmp_path), CXX="g++")
    assert status == 0
    assert found["compiler"].status == MISSING
    assert "install g++" in str(found["compiler"].fix)
    assert "--compile.blocks false" in str(found["compiler"].fix)
    _, found = doctor("--output-dir", str(tmp_path), CXX=sys.executable)
    assert found["compiler"].status == OK


def test_a_torch_that_cannot_be_imported_ends_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: no such file')")
    status, found = doctor("--output-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert status == 1
    assert found["torch"].status == MISSING
    assert "libcudart.so.12: no such file" in found["torch"].detail
    assert "cores" in found


def test_a_low_limit_of_open_files_ends_with_status_1(tmp_path: Path) -> None:
    status, found = doctor("--output-dir", str(tmp_path), limit=90)
    assert status == 1
    assert found["open files"].status == MISSING
    assert "at most 90 for each process, and one rank needs 100" in found["open files"].detail
    enough = num_open_files(8, "cpu")
    limits = {99: MISSING, 100: WARNING, enough - 1: WARNING, enough: OK, -1: OK}
    assert {limit: doctor_checks.open_files(limit).status for limit in limits} == limits


def test_a_folder_that_cannot_be_written_ends_with_status_1() -> None:
    status, found = doctor("--output-dir", "/proc/outputs")
    assert status == 1
    assert found["writing"].status == MISSING
    assert "output_dir" in str(found["writing"].fix)


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    found = doctor_checks.locks(tmp_path, refuse)
    assert found.status == WARNING
    assert "No locks available" in found.detail
    assert doctor_checks.locks(tmp_path, lambda: None).status == OK


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_checks.free_space("temp", tmp_path).status == OK
    monkeypatch.setitem(doctor_checks._MIN_FREE_BYTES, "temp", 1 << 60)
    found = doctor_checks.free_space("temp", tmp_path)
    assert found.status == WARNING
    assert "less than 1 EiB" in str(found.fix)


def test_packages_that_are_absent_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=1.26", "no-such-package>=1", "wandb>=1; extra == 'wandb'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    found = doctor_checks.required_packages()
    assert (found.status, found.detail, found.is_required) == (MISSING, "no-such-package", True)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed[:1])
    assert doctor_checks.required_packages().status == OK
    extra = doctor_checks.extra_package("wandb", "no_such_module", "for nothing")
    assert extra.status == OPTIONAL
    assert extra.fix == "run pip install 'switchtitan[wandb]' if you need it"


def test_the_hub_is_asked_only_with_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "warning  hub" in run("doctor", "--network").output
    assert "hub  " not in run("doctor").output


def test_communication_is_required_where_it_is_needed() -> None:
    assert doctor_checks.communication("NCCL", False, is_needed=False).status == OK
    needed = doctor_checks.communication("NCCL", False, is_needed=True)
    assert (needed.status, needed.is_required) == (MISSING, True)
