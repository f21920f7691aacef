"""`scripts/slurm/train.sbatch` on a running Slurm with two idle nodes, on this machine.

slurm.conf has `NodeName=n1,n2 NodeHostname=HOST Port=17101,17102` and /etc/hosts both names; then
start `slurmctld`, `slurmd -N n1` and `slurmd -N n2`.
"""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from support.tiny import tiny_toml

REPOSITORY = Path(__file__).parents[2]


def run(command, **variables):
    options = {"cwd": REPOSITORY, "env": os.environ | variables, "timeout": 60}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, **options)
    return done.stdout.strip()


pytestmark = [
    pytest.mark.skipif(
        len(run("sinfo --noheader --Node --states=idle").splitlines()) < 2,
        reason="needs a Slurm with two idle nodes, see its docstring",
    ),
    pytest.mark.timeout(1200),
]


class Job:
    """A job that trains on two nodes."""

    def __init__(self, folder, keys="", **variables):
        changes = {"steps = 40": "steps = 5000", "t]\ninterval = 20": "t]\ninterval = 9"}
        (folder / "config.toml").write_text(tiny_toml(folder / "tiny", "switchlora", changes))
        options = "--parsable --nodes=2 --gpus-per-node=0 --time=30 --job-name=test"
        script = f"scripts/slurm/train.sbatch --config {folder}/config.toml {keys}"
        self.id = run(f"sbatch {options} {script}", NGPU="1", **variables)

    def fact(self, name):
        return re.search(rf"\b{name}=(\S*)", run(f"scontrol show job {self.id}"))[1]

    def logs(self):
        """The job's log, and those of the nodes."""
        files = (REPOSITORY / f"test-{self.id}{of}.log" for of in ("", "-node-0", "-node-1"))
        return [file.read_text() if file.exists() else "" for file in files]

    def steps(self):
        return [int(step) for step in re.findall(r"^ *(\d+)/5000 +\d", self.logs()[1], re.M)]

    def wait_until(self, is_reached):
        deadline = time.monotonic() + 180
        while not is_reached():
            assert time.monotonic() < deadline, "\n".join(self.logs())
            time.sleep(0.3)

    def train(self):
        """Waits for steps, and a save."""
        num_steps = len(self.steps()) + 10
        self.wait_until(lambda: len(self.steps()) >= num_steps)

    def resume(self, number):
        """Waits for the n-th requeue, and starts the job without Slurm's delay."""
        self.wait_until(
            lambda: (self.fact("JobState"), self.fact("Restarts")) == ("PENDING", number)
        )
        time.sleep(3)  # within a second, the nodes would refuse the credential as revoked
        run(f"scontrol update JobId={self.id} StartTime=now")
        self.wait_until(lambda: self.logs()[1].count("resuming from") == int(number))
        self.train()


@pytest.fixture
def submit(tmp_path):
    """Submits a job, which is cancelled at the end."""
    jobs = []
    yield lambda *keys, **variables: jobs.append(Job(tmp_path, *keys, **variables)) or jobs[-1]
    for job in jobs:
        run(f"scancel {job.id}")
        job.wait_until(lambda job=job: not run(f"squeue --noheader --jobs={job.id}"))
        run(f"rm -f test-{job.id}[.-]*")


def test_a_job_is_requeued_and_resumes_until_it_is_cancelled(submit):
    job = submit()
    job.train()
    run(f"scancel --signal=USR1 --batch {job.id}")  # as Slurm does before the time limit
    job.resume("1")
    assert job.steps() == list(range(1, len(job.steps()) + 1)), "a step was trained twice"
    assert "Traceback" not in "".join(job.logs())
    for number, rank in (("2", 1), ("3", 0)):
        of_job = (
            f"grep -lzx RANK={rank} /proc/[0-9]*/environ | xargs grep -lzx SLURM_JOB_ID={job.id}"
        )
        run(f"kill -KILL $({of_job} | cut -d/ -f3)")
        job.resume(number)
        assert re.search(rf"rank {rank} on \S+ was killed by SIGKILL\nrequeueing", job.logs()[0])
    node = run(f"scontrol show hostnames {job.fact('NodeList')}").split()[1]
    run(f"scontrol update NodeName={node} State=down Reason=test")
    job.wait_until(lambda: job.fact("Restarts") == "4")
    run(f"scontrol update NodeName={node} State=resume")
    job.resume("4")
    run(f"scancel {job.id}")
    job.wait_until(lambda: job.fact("JobState") == "CANCELLED")
    assert job.fact("Restarts") == "4"
    assert job.logs()[0].splitlines()[-1].startswith("not requeueing")


@pytest.mark.parametrize(
    ("keys", "endpoint", "status", "reason"),
    [
        ("--training.step 9", "", "2:0", "--training.step 9: unknown key"),
        ("", "none.invalid:29500", "2:0", "none.invalid cannot be resolved"),
        ("--optimizer.lr 1e30", "", "3:0", "a loss or a gradient was not finite"),
    ],
)
def test_what_would_end_alike_is_said_once_and_not_requeued(submit, keys, endpoint, status, reason):
    job = submit(keys, RDZV_ENDPOINT=endpoint)
    job.wait_until(lambda: job.fact("JobState") == "FAILED")
    assert (job.fact("Restarts"), job.fact("ExitCode")) == ("0", status)
    assert "".join(job.logs()).count(reason) == 1
    assert job.logs()[0].splitlines()[-1].startswith("not requeueing")
    assert "Traceback" not in "".join(job.logs())
