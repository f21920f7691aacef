"""The scripts' set-up, with stand-ins for Python that record how they are called."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> "{log}"
case "$1" in
    --version) echo "Python {version}" ;;
    -m) if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi ;;
    -c) case "$2" in
        *version_info*) exit {is_too_old} ;;
        *ensurepip*) exit {lacks_venv} ;;
        esac ;;
esac
"""


class Machine:
    """A copy of the set-up script in a folder with a blank in its name, and the Pythons that it may find."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "the project"
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts/setup_env.sh", self.project / "scripts")
        (self.project / "pyproject.toml").write_text("[project]\n")
        self.log = folder / "calls"
        self.log.touch()
        self.path = folder / "bin"
        self.path.mkdir()
        for tool in ("bash", "sh", "cksum", "dirname", "mkdir", "cp", "cat", "uname"):
            (self.path / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} on this machine"))
        self.environment: dict[str, str] = {}

    def add_python(
        self, file: Path, *, version: str = "3.12.1", is_too_old: int = 0, lacks_venv: int = 0
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            FAKE_PYTHON.format(log=self.log, version=version, is_too_old=is_too_old, lacks_venv=lacks_venv)
        )
        file.chmod(0o755)

    def set_up(self, extra: str = "") -> subprocess.CompletedProcess[str]:
        command = 'set -euo pipefail; source "$1"; prepare_environment "$2"; echo "$PYTHON"'
        return subprocess.run(
            ["bash", "-c", command, "test", str(self.project / "scripts/setup_env.sh"), extra],
            env={"PATH": str(self.path), **self.environment},
            cwd=self.path,
            capture_output=True,
            text=True,
        )

    def installations(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m pip install")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_fresh_machine_gets_a_virtual_environment_once(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    first, second = machine.set_up(), machine.set_up()
    assert first.returncode == second.returncode == 0, first.stderr
    python = machine.project / ".venv/bin/python"
    assert first.stdout == second.stdout == f"{python}\n"
    assert len(machine.installations()) == 1
    assert machine.installations()[0].endswith(f"--editable {machine.project}")
    assert "installing" in first.stderr
    assert second.stderr == ""


def test_a_changed_pyproject_is_installed_again(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    machine.set_up()
    (machine.project / "pyproject.toml").write_text("[project]\nversion = 2\n")
    machine.set_up()
    assert len(machine.installations()) == 2


def test_what_the_tests_need_includes_what_a_run_needs(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    machine.set_up("dev")
    machine.set_up()
    assert len(machine.installations()) == 1
    assert machine.installations()[0].endswith(f"{machine.project}[dev]")


def test_what_a_run_needs_is_not_enough_for_the_tests(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    machine.set_up()
    machine.set_up("dev")
    assert len(machine.installations()) == 2


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used(machine: Machine, tmp_path: Path, variable: str) -> None:
    active = tmp_path / "active environment"
    machine.add_python(active / "bin/python")
    machine.environment[variable] = str(active)
    assert machine.set_up().stdout == f"{active}/bin/python\n"
    assert len(machine.installations()) == 1
    assert not (machine.project / ".venv").exists()


def test_an_old_python_is_refused(machine: Machine) -> None:
    machine.add_python(machine.path / "python3", version="3.8.1", is_too_old=1)
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.10 or newer found; install one")
    assert not (machine.project / ".venv").exists()


def test_a_newer_python_is_found_beside_an_old_one(machine: Machine) -> None:
    machine.add_python(machine.path / "python3", is_too_old=1)
    machine.add_python(machine.path / "python3.11", version="3.11.9")
    done = machine.set_up()
    assert done.returncode == 0
    assert "with Python 3.11.9" in done.stderr


def test_an_old_python_in_the_active_environment_is_refused(machine: Machine, tmp_path: Path) -> None:
    machine.add_python(tmp_path / "active/bin/python", version="3.9.0", is_too_old=1)
    machine.environment["VIRTUAL_ENV"] = str(tmp_path / "active")
    done = machine.set_up()
    assert done.returncode == 2
    assert "is Python 3.9.0, but this needs Python 3.10 or newer" in done.stderr
    assert machine.installations() == []


def test_a_python_without_venv_is_refused(machine: Machine) -> None:
    machine.add_python(machine.path / "python3", lacks_venv=1)
    done = machine.set_up()
    assert done.returncode == 2
    assert "python3 has no venv module; install it" in done.stderr


def test_a_failed_installation_is_tried_again(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    machine.set_up()
    for stamp in (machine.project / ".venv").glob(".switchtitan-*"):
        stamp.unlink()
    assert machine.set_up().returncode == 0
    assert len(machine.installations()) == 2


def test_a_missing_compiler_is_only_a_warning(machine: Machine) -> None:
    machine.add_python(machine.path / "python3")
    done = machine.set_up()
    assert done.returncode == 0
    assert "no C++ compiler" in done.stderr


@pytest.mark.parametrize("script", ["run_train.sh", "scripts/setup_env.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NGPU": "two"}, "NGPU=two: expected a whole number >= 1"),
        ({"NGPU": "0"}, "NGPU=0: expected a whole number >= 1"),
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT"),
    ],
)
def test_run_train_refuses_a_bad_environment(
    machine: Machine, environment: dict[str, str], expected: str
) -> None:
    machine.add_python(machine.path / "python3")
    shutil.copy(REPOSITORY / "run_train.sh", machine.project)
    done = subprocess.run(
        ["bash", str(machine.project / "run_train.sh")],
        env={"PATH": str(machine.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("environment", "module"),
    [
        ({"NGPU": "1"}, "-m switchtitan train --config my file.toml"),
        ({"NGPU": "2"}, "-m switchtitan launch --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d"),
        ({"NGPU": "1", "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "host:29500"}, "--node_rank 1 "),
    ],
)
def test_run_train_starts_the_right_module(
    machine: Machine, environment: dict[str, str], module: str
) -> None:
    machine.add_python(machine.path / "python3")
    shutil.copy(REPOSITORY / "run_train.sh", machine.project)
    subprocess.run(
        ["bash", str(machine.project / "run_train.sh"), "--config", "my file.toml"],
        env={"PATH": str(machine.path), "OMP_NUM_THREADS": "1", **environment},
        check=True,
        capture_output=True,
    )
    last_call = machine.log.read_text().splitlines()[-1]
    assert module in last_call
    assert last_call.endswith("train --config my file.toml")
