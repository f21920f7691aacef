"""Two "nodes" on one machine: two launchers with a folder each, which meet over localhost."""

import json
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny import METHOD_KEYS, TINY

REPOSITORY = Path(__file__).parents[2]
STEPS = ["--training.steps", "6", "--evaluation.interval", "6", "--checkpoint.interval", "6"]


def write_config(folder: Path) -> Path:
    """Writes a tiny configuration; command lines name its folders."""
    file = folder / "job.toml"
    text = TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    file.write_text(text)
    return file


def start(
    environment: dict[str, str], cwd: Path, arguments: Sequence[str], **variables: str
) -> subprocess.Popen[str]:
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [str(REPOSITORY / "run_train.sh"), *arguments],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_on_two_nodes(
    environment: dict[str, str], folder: Path, arguments: Sequence[str], *, with_index: bool
) -> list[tuple[int, str]]:
    """Returns status and output of each launcher; their folders are `folder/node-0` and `-1`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        start(
            environment,
            folder / f"node-{node}",
            arguments,
            NNODES="2",
            RDZV_ENDPOINT=f"localhost:{port}",
            **({"NODE_RANK": str(node)} if with_index else {}),
        )
        for node in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


def validation_loss(output_dir: Path) -> float:
    loss = json.loads((output_dir / "results.json").read_text())["loss/validation"]
    assert isinstance(loss, float)
    return loss


@pytest.fixture(scope="module")
def one_launcher(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """Returns the folder of a run with two ranks of one launcher, and its validation loss."""
    folder = tmp_path_factory.mktemp("nodes")
    arguments = ["--config", str(write_config(folder)), *STEPS]
    arguments += ["--data.cache_dir", str(folder / "corpora")]
    run = start(environment, folder, [*arguments, "--job.output_dir", "single"], NGPU="2")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return folder, validation_loss(folder / "single")


def test_two_nodes_with_shared_disks_train_as_one_launcher(
    environment: dict[str, str], one_launcher: tuple[Path, float]
) -> None:
    folder, expected = one_launcher
    arguments = ["--config", str(folder / "job.toml"), *STEPS]
    arguments += ["--data.cache_dir", str(folder / "corpora")]
    arguments += ["--job.output_dir", str(folder / "shared")]
    nodes = train_on_two_nodes(environment, folder, arguments, with_index=False)
    assert [status for status, _ in nodes] == [0, 0], nodes
    assert validation_loss(folder / "shared") == expected


def test_two_nodes_with_separate_corpora_train_alike(
    environment: dict[str, str], one_launcher: tuple[Path, float]
) -> None:
    """Both prepare: the path is relative, and the nodes have different folders."""
    folder, expected = one_launcher
    arguments = ["--config", str(folder / "job.toml"), *STEPS, "--data.cache_dir", "corpora"]
    arguments += ["--job.output_dir", str(folder / "separate corpora")]
    nodes = train_on_two_nodes(environment, folder, arguments, with_index=True)
    assert [status for status, _ in nodes] == [0, 0], nodes
    # With an index, the main rank is on node 0.
    assert "starting a new run" in nodes[0][1]
    assert "preparing the corpus again" in nodes[1][1]
    assert list((folder / "node-1" / "corpora").glob("*/index.json"))
    assert validation_loss(folder / "separate corpora") == expected


def test_separate_output_folders_are_refused_on_both_nodes(
    environment: dict[str, str], one_launcher: tuple[Path, float]
) -> None:
    folder, _ = one_launcher
    arguments = ["--config", str(folder / "job.toml"), *STEPS, "--job.output_dir", "outputs/run"]
    arguments += ["--data.cache_dir", str(folder / "corpora")]
    nodes = train_on_two_nodes(environment, folder, arguments, with_index=True)
    for status, output in nodes:
        assert status == 2, output
        assert "Traceback" not in output
        (line,) = output.splitlines()
        assert line.startswith("error: rank 1 on ")
        assert line.endswith("put output_dir on a disk that all nodes share")
    assert not list(folder.glob("node-*/outputs"))
