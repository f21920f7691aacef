"""The scripts in bash with stand-ins for Python and Slurm, and commands as real processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from switchtitan.errors import CLOSED_OUTPUT_STATUS

REPOSITORY = Path(__file__).parents[2]
PYTHON = """\
#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install "*) exit {pip_status} ;;
    *version_info*) exit {is_too_old} ;;
    *device_count*) echo {num_gpus} ;;
    *mem_get_info*) echo 85000000000 ;;
esac
"""


class Machine:
    """A copy of the scripts in a folder with a space in its name, and a Python that records."""

    def __init__(self, folder):
        self.project, self.log, self.path = folder / "the project", folder / "calls", folder / "bin"
        (self.project / "scripts").mkdir(parents=True)
        for name in ("run_train.sh", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, self.project / name)
        for name in ("setup_env.sh", "gpu_acceptance.sh"):
            shutil.copy(REPOSITORY / "scripts" / name, self.project / "scripts" / name)
        self.log.touch()
        self.path.mkdir()
        for tool in ("bash", "sh", "cksum", "cp", "dirname", "flock", "mkdir", "rm", "timeout"):
            (self.path / tool).symlink_to(shutil.which(tool))
        self.add_python()

    def add_python(self, **answers):
        file = self.path / "python3"
        answers = {"pip_status": 0, "is_too_old": 0, "num_gpus": 1} | answers
        file.write_text(PYTHON.format(log=self.log, **answers))
        file.chmod(0o755)

    def run(self, *arguments, script="run_train.sh", **variables):
        """Returns the status and standard error."""
        done = subprocess.run(
            ["bash", str(self.project / script), *arguments],
            env={"PATH": str(self.path), "NGPU": "1", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    def calls(self, start):
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_project_is_installed_once_and_again_after_a_change_or_a_failure(machine):
    machine.add_python(pip_status=1)
    status, errors = machine.run()
    assert status == 2
    assert "error: the installation failed" in errors
    assert not machine.calls("-m switchtitan")
    machine.add_python()
    shutil.rmtree(machine.project / ".venv")
    assert machine.run()[0] == 0
    assert machine.run() == (0, "")
    assert len(machine.calls("-m pip install")) == 2
    assert machine.calls("-m pip install")[-1].endswith(f"--editable {machine.project}[train]")
    (machine.project / "pyproject.toml").write_text("[project]\nversion = 2\n")
    machine.run()
    assert len(machine.calls("-m pip install")) == 3
    machine.add_python(is_too_old=1)
    shutil.rmtree(machine.project / ".venv")
    assert "no Python 3.10 or newer" in machine.run()[1]


TWO_NODES = {"NNODES": "2", "RDZV_ENDPOINT": "host:29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NGPU": "two"}, "NGPU=two"),
        ({"NNODES": "2"}, "RDZV_ENDPOINT"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1"),
        ({**TWO_NODES, "NODE_RANK": "1", "RDZV_CONF": "timeout=9,is_host=1"}, "RDZV_CONF=timeout"),
    ],
)
def test_run_train_refuses_a_bad_environment(machine, variables, expected):
    status, errors = machine.run(**variables)
    assert status == 2
    assert expected in errors.splitlines()[-1]
    assert not machine.calls("-m switchtitan")


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"NGPU": "1"}, "-m switchtitan train --config my file.toml"),
        ({"NGPU": "2"}, "-m switchtitan launch --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d"),
        ({"NGPU": "2"}, "--rdzv_backend c10d --rdzv_endpoint localhost:0"),
        (
            {**TWO_NODES, "NODE_RANK": "1"},
            "--rdzv_backend static --node_rank 1 --rdzv_endpoint host:29500 ",
        ),
        (
            {**TWO_NODES, "RDZV_CONF": "is_host=1,join_timeout=9"},
            "--rdzv_backend c10d --rdzv_endpoint host:29500 --rdzv_id switchtitan "
            "--rdzv_conf is_host=1,join_timeout=9 train",
        ),
    ],
)
def test_run_train_starts_the_right_command(machine, variables, command):
    machine.run("--config", "my file.toml", OMP_NUM_THREADS="1", **variables)
    last_call = machine.log.read_text().splitlines()[-1]
    assert command in last_call
    assert last_call.endswith("train --config my file.toml")


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_the_acceptance_measures_steps_that_have_bounds(machine, num_gpus):
    machine.add_python(num_gpus=num_gpus)
    assert machine.run(script="scripts/gpu_acceptance.sh")[0] == 0
    bounded = {
        (side, str(record["num_ranks"]), str(record["num_sequences"]))
        for file in (REPOSITORY / "docs" / "measurements").glob("gpu_bounds_*.json")
        for record in [json.loads(file.read_text())]
        for side in record["rows"]
    }
    measured = [
        (side, num_ranks, num_sequences)
        for call in machine.calls("-m switchtitan launch")
        for num_ranks, sides, num_sequences in re.findall(
            r"_node (\d+) benchmark step (.*) --data.dataset .*--training.local_batch_size (\d+)",
            call,
        )
        for side in sides.split()
    ]
    assert len(measured) == 6
    assert set(measured) <= bounded


STAND_INS = {
    # Ends at once; test_slurm.py has a real one.
    "srun": """#!/usr/bin/env bash
[ -z "$RECORDED" ] || printf '%s\\nthe reason\\n' "$RECORDED" >"$SWITCHTITAN_ENDED"
[ -z "${SAVES:-}" ] || echo "saved run/checkpoints/step-000000004 in 0.1 s" >>job-7-node-0.log
exit "$STATUS"
""",
    "scontrol": '#!/bin/sh\necho "$*" >>calls\n',
    "run_train.sh": "",
    "scripts/setup_env.sh": "prepare_environment() { :; }\n",
}


@pytest.fixture
def run_job(tmp_path):
    """Returns what runs the script for Slurm, and returns the last line and whether it requeues."""
    (tmp_path / "scripts").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NUM_NODES": "2"}
    script = REPOSITORY / "scripts" / "slurm" / "train.sbatch"

    def run(**of_job):
        of_job |= variables | {"SLURM_JOB_NODELIST": "node-[1-2]"}
        (tmp_path / "job-7.ended-9").write_text("143\nof an earlier start\n")
        (tmp_path / "calls").write_text("")
        output = subprocess.run(["bash", script], env=of_job, stdout=subprocess.PIPE, text=True)
        assert output.stdout.count("reason") == bool(of_job["RECORDED"])
        assert not list(tmp_path.glob("*.ended-*"))
        return output.stdout.splitlines()[-1:], "requeue 7" in (tmp_path / "calls").read_text()

    return run


@pytest.mark.parametrize(
    ("status", "recorded", "is_requeued"),
    [
        ("0", "", False),
        ("143", "2", False),  # a mistake; srun has terminated the other node
        ("137", "3", False),
        ("130", "130", False),  # scancel --signal=INT
        ("143", "143", True),
        ("5", "5", True),
        ("143", "1", True),  # a crash
        ("137", "", True),  # even the launcher was killed
    ],
)
def test_what_the_run_has_recorded_decides_whether_a_job_is_requeued(
    run_job, status, recorded, is_requeued
):
    said, was_requeued = run_job(STATUS=status, RECORDED=recorded)
    assert was_requeued == is_requeued
    assert status == "0" or said[0].startswith("requeueing" if is_requeued else "not requeueing")


def test_starts_that_save_nothing_are_not_repeated_for_ever(run_job):
    ends = [run_job(STATUS="1", RECORDED="1", SAVES=saves) for saves in ("", "1", "", "", "")]
    assert [was_requeued for _, was_requeued in ends] == [True, True, True, True, False]
    assert "3 starts in a row have saved no checkpoint" in ends[-1][0][0]


ABORTS_AT_THE_END = """
import atexit, os, sys
from switchtitan.cli import main
class Aborts:
    def __del__(self):
        os.abort()
main.kept = Aborts()
atexit.register(print, "at exit")
print("torch" in sys.modules)
main.run(["no-such-command"])
"""


def run_python(*words, output=subprocess.PIPE):
    # As a user's: with a buffer.
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *words],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        env=environment,
    )


def test_a_failed_command_keeps_its_status_whatever_it_leaves_behind():
    done = run_python("-c", ABORTS_AT_THE_END)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr
    # GNU's OpenMP would read its variables before they are set.
    assert done.stdout.split() == ["False", "at", "exit"]


def test_a_command_that_nobody_reads_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = run_python("-m", "switchtitan", "--help", output=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_OUTPUT_STATUS, "")


def test_the_wheel_has_the_package_and_the_configurations(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("switchtitan", "train_configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    expected = {
        f"switchtitan/train_configs/{file.relative_to(source / 'train_configs')}"
        for file in (source / "train_configs").rglob("*.toml")
    }
    package = (source / "switchtitan").rglob("*.*")
    expected |= {str(file.relative_to(source)) for file in package if file.is_file()}
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps")
    done = run_python(*pip, "--no-build-isolation", "-w", str(tmp_path), str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not expected - set(zipfile.ZipFile(wheel).namelist())
