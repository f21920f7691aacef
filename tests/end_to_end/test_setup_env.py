"""`./run_train.sh` with fake Pythons that record their calls: what it installs and starts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    --version) echo "Python {version}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install "*) sleep {pip_s}; exit {pip_status} ;;
    *version_info*) exit {is_too_old} ;;
    *ensurepip*) exit {lacks_venv} ;;
esac
"""


class Machine:
    """A copy of the scripts in a folder with a space in its name, and fake Pythons on PATH."""

    def __init__(self, folder):
        self.project = folder / "the project"
        (self.project / "scripts").mkdir(parents=True)
        for name in ("scripts/setup_env.sh", "run_train.sh", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, self.project / name)
        self.log = folder / "calls"
        self.log.touch()
        self.path = folder / "bin"
        self.path.mkdir()
        for tool in ("bash", "sh", "cksum", "cp", "dirname", "flock", "mkdir", "sleep"):
            (self.path / tool).symlink_to(
                shutil.which(tool) or pytest.skip(f"no {tool} on this machine")
            )
        self.environment = {}

    def add_python(self, file="python3", **answers):
        file = self.path / file
        file.parent.mkdir(parents=True, exist_ok=True)
        defaults = {
            "version": "3.12.1",
            "is_too_old": 0,
            "lacks_venv": 0,
            "pip_s": 0,
            "pip_status": 0,
        }
        file.write_text(FAKE_PYTHON.format(log=self.log, **(defaults | answers)))
        file.chmod(0o755)

    def start(self, *arguments, **environment):
        return subprocess.Popen(
            ["bash", str(self.project / "run_train.sh"), *arguments],
            env={"PATH": str(self.path), "NGPU": "1", **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **environment):
        """Returns the status and standard error."""
        process = self.start(*arguments, **environment)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def calls(self, start):
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_an_environment_is_created_and_the_project_installed_once(machine):
    machine.add_python()
    assert "installing switchtitan" in machine.run()[1]
    assert machine.run() == (0, "")
    (installation,) = machine.calls("-m pip install")
    assert installation.endswith(f"--editable {machine.project}")
    assert len(machine.calls("-m switchtitan train")) == 2
    (machine.project / "pyproject.toml").write_text("[project]\nversion = 2\n")
    machine.run()
    assert len(machine.calls("-m pip install")) == 2


def test_the_dev_installation_serves_runs_but_not_the_reverse(machine):
    machine.add_python()
    command = [
        "bash",
        "-euc",
        'source "$1"; prepare_environment "$2"',
        "-",
        str(machine.project / "scripts/setup_env.sh"),
    ]
    for extra, num_installations in (("", 1), ("dev", 2), ("", 2)):
        subprocess.run(
            [*command, extra], env={"PATH": str(machine.path)}, check=True, capture_output=True
        )
        assert len(machine.calls("-m pip install")) == num_installations
    assert machine.calls("-m pip install")[-1].endswith(f"{machine.project}[dev]")


def test_nodes_that_share_a_checkout_install_once(machine):
    machine.add_python(pip_s=1)
    nodes = [machine.start() for _ in range(3)]
    assert [node.wait(60) for node in nodes] == [0, 0, 0]
    assert len(machine.calls("-m venv")) == len(machine.calls("-m pip install")) == 1
    assert len(machine.calls("-m switchtitan train")) == 3


def test_an_installation_without_file_locks_warns(machine):
    machine.add_python()
    assert "warning: no file locks" not in machine.run()[1]
    (machine.path / "flock").unlink()
    shutil.rmtree(machine.project / ".venv")
    status, errors = machine.run()
    assert status == 0
    assert errors.startswith("warning: no file locks; start only one process until")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used(machine, tmp_path, variable):
    machine.add_python(tmp_path / "active one/bin/python")
    assert machine.run(**{variable: str(tmp_path / "active one")})[0] == 0
    assert len(machine.calls("-m pip install")) == 1
    assert not (machine.project / ".venv").exists()


def test_constraints_are_passed_to_pip(machine):
    machine.add_python()
    machine.run(SWITCHTITAN_CONSTRAINTS="the versions.txt")
    assert "--constraint the versions.txt --editable" in machine.calls("-m pip install")[0]


def test_a_newer_python_is_found_next_to_an_old_one(machine):
    machine.add_python(is_too_old=1)
    machine.add_python("python3.11")
    assert machine.run()[0] == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"is_too_old": 1}, "error: no Python 3.10 or newer found; install one, or set PYTHON="),
        ({"lacks_venv": 1}, "error: python3 has no venv module; install it"),
        (
            {"pip_status": 1},
            "error: the installation failed (see above); fix the cause and run this again",
        ),
    ],
)
def test_a_failed_setup_is_reported_and_retried_next_time(machine, answers, message):
    machine.add_python(**answers)
    status, errors = machine.run()
    assert status == 2
    assert errors.splitlines()[-1].startswith(message)
    assert not machine.calls("-m switchtitan")
    shutil.rmtree(machine.project / ".venv", ignore_errors=True)
    machine.add_python()
    assert machine.run()[0] == 0


def test_an_old_python_in_the_active_environment_is_refused(machine, tmp_path):
    machine.add_python(tmp_path / "active/bin/python", version="3.9.0", is_too_old=1)
    status, errors = machine.run(VIRTUAL_ENV=str(tmp_path / "active"))
    assert status == 2
    assert "is Python 3.9.0; expected Python 3.10 or newer" in errors
    assert not machine.calls("-m pip install")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NGPU": "two"}, "NGPU=two: expected an integer >= 1"),
        ({"NGPU": "0"}, "NGPU=0: expected an integer >= 1"),
        ({"NNODES": "2"}, "NNODES=2: needs RDZV_ENDPOINT=HOST:PORT"),
        ({"NODE_RANK": "first"}, "NODE_RANK=first: expected an integer >= 0"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: expected an index below NNODES=1"),
        *(
            (
                {"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "h:29500", "RDZV_CONF": conf},
                f"RDZV_CONF={conf}: with NODE_RANK, expected timeout=SECONDS",
            )
            for conf in ("join_timeout=9", "timeout=9,is_host=1", "timeout=")
        ),
    ],
)
def test_run_train_refuses_a_bad_environment(machine, environment, expected):
    machine.add_python()
    status, errors = machine.run(**environment)
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({"NGPU": "1"}, "-m switchtitan train --config my file.toml"),
        ({"NGPU": "2"}, "-m switchtitan launch --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d"),
        (
            {"NGPU": "2", "NODE_RANK": "0"},
            "--nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0",
        ),
        (
            {"NGPU": "1", "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "host:29500"},
            "--rdzv_backend static --node_rank 1 --rdzv_endpoint host:29500 ",
        ),
        (
            {
                "NNODES": "2",
                "NODE_RANK": "0",
                "RDZV_ENDPOINT": "host:29500",
                "RDZV_CONF": "timeout=1800",
            },
            "--rdzv_id switchtitan --rdzv_conf timeout=1800 train",
        ),
        (
            {
                "NGPU": "1",
                "NNODES": "2",
                "RDZV_ENDPOINT": "host:29500",
                "RDZV_CONF": "is_host=1,join_timeout=9",
            },
            "--rdzv_backend c10d --rdzv_endpoint host:29500 --rdzv_id switchtitan "
            "--rdzv_conf is_host=1,join_timeout=9 train",
        ),
    ],
)
def test_run_train_starts_the_right_command(machine, environment, command):
    machine.add_python()
    machine.run("--config", "my file.toml", OMP_NUM_THREADS="1", **environment)
    last_call = machine.log.read_text().splitlines()[-1]
    assert command in last_call
    assert last_call.endswith("train --config my file.toml")


def test_the_given_python_creates_the_environment(machine, tmp_path):
    machine.add_python(tmp_path / "my python")
    assert machine.run(PYTHON=str(tmp_path / "my python"))[0] == 0
    assert os.access(machine.project / ".venv/bin/python", os.X_OK)


@pytest.mark.parametrize(
    "script",
    [
        "run_train.sh",
        "scripts/setup_env.sh",
        "scripts/slurm/train.sbatch",
        "scripts/test.sh",
        ".ci/run",
    ],
)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=True)
