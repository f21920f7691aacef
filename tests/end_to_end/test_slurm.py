"""`scripts/slurm/train.sbatch` on a running Slurm with two idle nodes, on this machine.

slurm.conf has `NodeName=n1,n2 NodeHostname=HOST Port=17101,17102` and /etc/hosts both names; then
start `slurmctld`, `slurmd -N n1` and `slurmd -N n2`.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.sessions import complete_environment
from support.tiny import tiny_toml

REPOSITORY = Path(__file__).parents[2]
FILES = ("pyproject.toml", "run_train.sh", "scripts", "switchtitan", "train_configs")


def run(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, **options)
    return done.stdout.strip()


def has_two_nodes():
    try:
        return len(run("sinfo", "--noheader", "--Node", "--states=idle").splitlines()) >= 2
    except (OSError, subprocess.SubprocessError):
        return False


pytestmark = [
    pytest.mark.skipif(not has_two_nodes(), reason="needs a Slurm with two idle nodes: see above"),
    pytest.mark.timeout(1200),
]


class Job:
    """A job that trains on two nodes."""

    def __init__(self, project, *keys, **variables):
        options = ("--parsable", "--nodes=2", "--gpus-per-node=0", "--time=30")
        script = ("scripts/slurm/train.sbatch", "--config", "config.toml")
        environment = {**os.environ, "NGPU": "1", "VIRTUAL_ENV": str(project / "venv"), **variables}
        self.id = run("sbatch", *options, *script, *keys, cwd=project, env=environment)
        self.project = project

    def fact(self, name):
        return re.search(rf"{name}=(\S+)", run("scontrol", "show", "job", self.id))[1]

    @property
    def logs(self):
        """The job's log, and those of the nodes."""
        names = (f"switchtitan-{self.id}{node}.log" for node in ("", "-node-0", "-node-1"))
        files = (self.project / name for name in names)
        return [file.read_text() if file.exists() else "" for file in files]

    @property
    def steps(self):
        """The steps that node 0 has reported, in order."""
        return [int(step) for step in re.findall(r"^ *(\d+)/5000 +\d", self.logs[1], re.M)]

    def wait_until(self, is_reached):
        deadline = time.monotonic() + 180
        while not is_reached():
            assert time.monotonic() < deadline, "\n".join(self.logs)
            time.sleep(0.3)

    def wait_for_steps(self, number):
        num_before = len(self.steps)
        self.wait_until(lambda: len(self.steps) >= num_before + number)

    def resume_after_requeue(self, number):
        """Waits until Slurm has requeued the job `number` times, and starts it without a delay."""
        self.wait_until(lambda: self.fact("Restarts") == str(number))
        self.wait_until(lambda: self.fact("JobState") == "PENDING")
        time.sleep(3)  # within a second, the nodes would refuse the credential as revoked
        run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.wait_until(lambda: self.logs[1].count("resuming from") == number)
        self.wait_for_steps(2)

    def kill_rank(self, rank):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if {f"SLURM_JOB_ID={self.id}".encode(), b"RANK=%d" % rank} <= set(variables):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def submit(tmp_path):
    """Submits a job in a repository's folder of its own; cancelled at the end."""
    jobs = []

    def start(*keys, **variables):
        jobs.append(Job(tmp_path, *keys, **variables))
        return jobs[-1]

    for name in FILES:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    complete_environment(tmp_path / "venv", tmp_path)
    changes = {
        "steps = 40": "steps = 5000",
        "[checkpoint]\ninterval = 20": "[checkpoint]\ninterval = 9",
    }
    (tmp_path / "config.toml").write_text(tiny_toml(tmp_path / "tiny", "switchlora", changes))
    yield start
    for job in jobs:
        run("scancel", job.id)
        job.wait_until(lambda job=job: not run("squeue", "--noheader", f"--jobs={job.id}"))


def test_a_job_is_requeued_and_resumes_until_it_is_cancelled(submit):
    job = submit()
    job.wait_for_steps(3)
    run("scancel", "--signal=USR1", "--batch", job.id)  # as Slurm does before the time limit
    job.resume_after_requeue(1)
    assert job.steps == list(range(1, len(job.steps) + 1)), "a step was trained twice"
    assert "Traceback" not in "".join(job.logs)
    for number, rank in enumerate((1, 0), start=2):
        job.wait_for_steps(10)
        job.kill_rank(rank)
        job.resume_after_requeue(number)
        assert re.search(rf"rank {rank} on \S+ was killed by SIGKILL\nrequeueing", job.logs[0])
    if os.geteuid() == 0:  # Slurm's administrator
        nodes = run("scontrol", "show", "hostnames", job.fact(" NodeList")).split()
        job.wait_for_steps(10)
        run("scontrol", "update", f"NodeName={nodes[1]}", "State=down", "Reason=test")
        job.wait_until(lambda: job.fact("Restarts") == "4")
        subprocess.run(["scontrol", "update", f"NodeName={nodes[1]}", "State=resume"])
        job.resume_after_requeue(4)
    num_restarts = job.fact("Restarts")
    run("scancel", job.id)
    job.wait_until(lambda: job.fact("JobState") == "CANCELLED")
    assert job.fact("Restarts") == num_restarts
    assert job.logs[0].splitlines()[-1].startswith("not requeueing")


@pytest.mark.parametrize(
    ("keys", "endpoint", "status", "reason"),
    [
        (("--training.step", "9"), "", 2, "--training.step 9: unknown key"),
        ((), "none.invalid:29500", 2, "none.invalid cannot be resolved"),
        (("--optimizer.lr", "1e30"), "", 3, "a loss or a gradient was not finite"),
    ],
)
def test_what_would_end_so_again_is_said_once_and_not_requeued(
    submit, keys, endpoint, status, reason
):
    job = submit(*keys, RDZV_ENDPOINT=endpoint)
    job.wait_until(lambda: job.fact("JobState") == "FAILED")
    assert (job.fact("Restarts"), job.fact("ExitCode")) == ("0", f"{status}:0")
    assert "".join(job.logs).count(reason) == 1
    assert job.logs[0].splitlines()[-1].startswith("not requeueing")
    assert "Traceback" not in "".join(job.logs)
