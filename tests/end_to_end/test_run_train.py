"""`./run_train.sh` as a user runs it trains and resumes, also on two "nodes" of this machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.long_form import IS_LONG
from support.sessions import started
from support.tiny import tiny_toml
from torch.distributed.elastic.utils.distributed import get_free_port

REPOSITORY = Path(__file__).parents[2]
QUICKSTART_RESULTS = "outputs/llama_quickstart_switchlora/results.json"
SCRIPT = str(REPOSITORY / "run_train.sh")
TO_PIPE = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables that make the script use this interpreter as a complete environment."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    with (REPOSITORY / "pyproject.toml").open("rb") as project:
        done = subprocess.run(["cksum"], stdin=project, capture_output=True, text=True, check=True)
    (folder / ".switchtitan-installed-train").write_text(f"{done.stdout.strip()} {REPOSITORY}\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**inherited, "VIRTUAL_ENV": str(folder), "OMP_NUM_THREADS": "1", "NGPU": "1"}


def run_train(environment, folder, *arguments, **variables):
    """Runs the script in `folder`; returns its status, and standard output and error together."""
    done = subprocess.run(
        [SCRIPT, *arguments], cwd=folder, env=environment | variables, timeout=850, **TO_PIPE
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


@pytest.mark.skipif(not IS_LONG, reason="takes three minutes; ./scripts/test.sh --faults runs it")
def test_the_quickstart_ends_with_the_loss_that_its_seeds_show(environment, tmp_path):
    status, said = run_train(environment, tmp_path)
    assert status == 0, said
    results = json.loads((tmp_path / QUICKSTART_RESULTS).read_text())
    assert results["step"] == 120
    # Five seeds ended at 4.35 to 4.52, with a deviation of 0.07: three of them.
    assert results["loss/validation"] == pytest.approx(4.46, abs=0.2)


def write_config(folder):
    """Writes a tiny run's configuration with the output folder `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "switchlora.toml"
    shorter = {"steps = 40": "steps = 6", "interval = 20": "interval = 3"}
    file.write_text(tiny_toml(folder, "switchlora", shorter))
    return file


def test_a_run_trains_and_resumes_on_two_ranks(environment, corpora):
    folder = corpora / "a user's folder"
    config, output = ("--config", str(write_config(folder))), folder / "run"
    watch = ("--metrics.tensorboard", "true", "--profiler.enabled", "true")
    first = run_train(environment, folder, *config, *watch, "--profiler.start_step", "3")
    assert first[0] == 0, first
    assert "starting a new run in" in first[1]
    assert (output / "checkpoints" / "step-000000006" / "metadata.json").is_file()
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    assert list((output / "tensorboard").glob("*.pt.trace.json"))

    second = run_train(environment, folder, *config, "--training.steps", "12", NGPU="2")
    assert second[0] == 0, second
    resumed_from = output / "checkpoints" / "step-000000006"
    assert second[1].count(f"resuming from {resumed_from}") == 1
    assert (output / "checkpoints" / "step-000000012").is_dir()


def test_two_nodes_with_separate_corpora_train_as_one_run(environment, tmp_path):
    """Both prepare: the path is relative, and the nodes have different folders."""
    together = ("--data.cache_dir", "corpora", "--job.output_dir", str(tmp_path / "together"))
    command = [SCRIPT, "--config", str(write_config(tmp_path)), *together]
    meet = environment | {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{get_free_port()}"}
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        folder.mkdir()
    first, second = (
        started(command, folder / "output", cwd=folder, env=meet | {"NODE_RANK": folder.name[-1]})
        for folder in folders
    )
    with first as main, second as other:
        ends = [node.process.wait(timeout=300) for node in (main, other)]
    assert ends == [0, 0], main.said + other.said
    # The main rank is on node 0.
    assert "starting a new run" in main.said
    assert "starting a new run" not in other.said
    assert list((folders[1] / "corpora").glob("*/index.json"))
    assert json.loads((tmp_path / "together" / "results.json").read_text())["step"] == 6
