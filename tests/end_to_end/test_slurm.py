"""`scripts/slurm/train.sbatch` with stand-ins for Slurm's commands."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAND_INS = {
    # Runs the command once per node, at the same time; fails if one of them fails.
    "srun": """\
#!/usr/bin/env bash
echo "$*" > srun-options
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes[node]=$!; done
status=0
for node in 0 1; do wait "${nodes[node]}" || status=$?; done
exit "$status"
""",
    "scontrol": """\
#!/usr/bin/env bash
echo "$*" >> scontrol-calls
[ "$1" != show ] || printf 'node-a\\nnode-b\\n'
[ "$1" != requeue ] || exit "${REQUEUE_STATUS:-0}"
""",
    "scancel": """\
#!/usr/bin/env bash
echo "scancel $*" >> scontrol-calls
kill -TERM $(cat pid-0 pid-1)
""",
}
RUN_TRAIN = """\
#!/usr/bin/env bash
for argument in "$@"; do
    echo "$NNODES $NODE_RANK $RDZV_ENDPOINT $RDZV_ID [$argument]" >> "node-$NODE_RANK"
done
trap 'exit "${STOPPED_STATUS:-143}"' TERM
echo $$ > "new-$NODE_RANK"; mv "new-$NODE_RANK" "pid-$NODE_RANK"
# Without this script's output: a reader of it would wait for `sleep`.
if [ -n "${LASTS_S:-}" ]; then sleep "$LASTS_S" > /dev/null 2>&1 & wait "$!"; fi
exit "${STATUS:-0}"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Returns a repository's folder with the script; its other scripts are stand-ins."""
    project = tmp_path / "the project"
    (project / "scripts" / "slurm").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    files = {tmp_path / "bin" / name: text for name, text in STAND_INS.items()}
    files[project / "run_train.sh"] = RUN_TRAIN
    files[project / "scripts" / "setup_env.sh"] = "prepare_environment() { touch prepared; }\n"
    for file, text in files.items():
        file.write_text(text)
        file.chmod(0o755)
    shutil.copy(REPOSITORY / "scripts" / "slurm" / "train.sbatch", tmp_path / "spooled")
    return project


def submit(project: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{project.parent / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NAME": "switchtitan",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    return subprocess.Popen(
        ["bash", str(project.parent / "spooled"), *arguments],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_each_node_runs_one_launcher_with_its_index(cluster: Path) -> None:
    job = submit(cluster, "--config", "my file.toml")
    assert job.communicate(timeout=60) == ("", None)
    assert job.returncode == 0
    assert (cluster / "prepared").exists()
    for node in (0, 1):
        expected = f"2 {node} node-a:24567 1234567"
        lines = (cluster / f"node-{node}").read_text().splitlines()
        assert lines == [f"{expected} [--config]", f"{expected} [my file.toml]"]
    options = (cluster / "srun-options").read_text()
    assert "--ntasks-per-node=1 --kill-on-bad-exit=1" in options
    assert "--output=switchtitan-1234567-node-%n.log" in options


def test_the_status_of_a_failed_run_is_the_jobs(cluster: Path) -> None:
    job = submit(cluster, "--config", "job.toml", STATUS="2")
    job.communicate(timeout=60)
    assert job.returncode == 2
    assert "requeue" not in (cluster / "scontrol-calls").read_text()


def wait_for_nodes(project: Path) -> None:
    deadline = time.monotonic() + 30
    while not all((project / f"pid-{node}").exists() for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("requeue_status", ["0", "1"])
def test_the_run_is_stopped_and_the_job_requeued_before_its_time_limit(
    cluster: Path, requeue_status: str
) -> None:
    job = submit(cluster, "--config", "job.toml", LASTS_S="60", REQUEUE_STATUS=requeue_status)
    wait_for_nodes(cluster)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert output.startswith("the time limit is near: the run stops")
    assert (cluster / "scontrol-calls").read_text().splitlines()[-2:] == [
        "scancel --signal=TERM 1234567",
        "requeue 1234567",
    ]
    assert ("warning: scontrol requeue failed" in output) == (requeue_status == "1")
    assert job.returncode == 143


@pytest.mark.parametrize(("status", "is_requeued"), [("143", True), ("5", True), ("0", False)])
def test_the_job_is_requeued_after_slurm_has_stopped_the_run(
    cluster: Path, status: str, is_requeued: bool
) -> None:
    """Slurm sends SIGTERM to the processes of srun, not to the script, before a pre-emption."""
    job = submit(cluster, "--config", "job.toml", LASTS_S="60", STOPPED_STATUS=status)
    wait_for_nodes(cluster)
    for node in (0, 1):
        os.kill(int((cluster / f"pid-{node}").read_text()), signal.SIGTERM)
    job.communicate(timeout=60)
    assert ("requeue 1234567" in (cluster / "scontrol-calls").read_text()) == is_requeued
    assert job.returncode == int(status)


def test_a_submission_from_another_folder_is_refused(cluster: Path) -> None:
    job = submit(cluster, SLURM_SUBMIT_DIR=str(cluster.parent))
    assert "call sbatch in the repository's folder" in job.communicate(timeout=60)[0]
    assert job.returncode == 2
