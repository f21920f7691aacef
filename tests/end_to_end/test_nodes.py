"""Two "nodes" on one machine: two launchers with a folder each, which meet over localhost."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
from support.tiny import METHOD_KEYS, TINY

REPOSITORY = Path(__file__).parents[2]
STEPS = ("--training.steps", "6", "--evaluation.interval", "6", "--checkpoint.interval", "6")


def start(environment, cwd, *arguments, **variables):
    cwd.mkdir(parents=True, exist_ok=True)
    config = cwd.parent / "job.toml"
    words = [REPOSITORY / "run_train.sh", "--config", config, *STEPS, *arguments]
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_on_two_nodes(environment, folder, *arguments):
    """Returns status and output of each launcher; their folders are `folder/node-0` and `-1`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{port}"}
    nodes = [
        start(environment, folder / f"node-{node}", *arguments, **meet, NODE_RANK=f"{node}")
        for node in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    text = TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    (folder / "job.toml").write_text(text)
    return folder


def test_two_nodes_with_separate_corpora_train_as_one_run(environment, folder):
    """Both prepare: the path is relative, and the nodes have different folders."""
    keys = ("--data.cache_dir", "corpora", "--job.output_dir", folder / "together")
    nodes = train_on_two_nodes(environment, folder, *keys)
    assert [status for status, _ in nodes] == [0, 0], nodes
    # The main rank is on node 0.
    assert "starting a new run" in nodes[0][1]
    assert "starting a new run" not in nodes[1][1]
    assert list((folder / "node-1" / "corpora").glob("*/index.json"))
    assert json.loads((folder / "together" / "results.json").read_text())["step"] == 6
