"""The commands of docs/OBSERVE.md, on a tiny model, and what the page says that they write."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "OBSERVE.md").read_text()
COMMANDS = [
    line for block in re.findall(r"(?ms)^```bash\n(.*?)^```", PAGE) for line in block.splitlines()
]
SMALL = (
    *("--model.hidden_size", "20", "--model.intermediate_size", "28", "--model.num_layers", "2"),
    *("--model.num_heads", "2", "--model.num_kv_heads", "1", "--model.vocab_size", "271"),
    *("--data.vocab_size", "270", "--data.seq_len", "16", "--data.max_bytes", "200000"),
    *("--training.steps", "8", "--training.global_batch_size", "4", "--data.num_workers", "0"),
    *("--evaluation.interval", "4", "--evaluation.tokens", "160", "--checkpoint.interval", "4"),
    *("--compile.blocks", "false", "--compile.loss", "false", "--compile.optimizer", "false"),
    *(
        "--method.rank",
        "6",
        "--profiler.start_step",
        "3",
        "--metrics.interval",
        "2",
        "--lr_schedule.warmup_steps",
        "2",
    ),
)


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables and the words of a command."""
    words = shlex.split(command)
    variables = {}
    while "=" in words[0] and not words[0].startswith("-"):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def test_every_command_is_run_by_a_test():
    programs = {split(command)[1][0] for command in COMMANDS}
    # tests/unit/docs/test_shown_commands.py runs those of `switchtitan`.
    assert programs == {"./run_train.sh", "tensorboard", "pip", "switchtitan"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder in which all training commands of the page have run, one after another."""
    folder = tmp_path_factory.mktemp("observe")
    has_trackers = find_spec("wandb") is not None and find_spec("trackio") is not None
    for number, command in enumerate(COMMANDS):
        variables, words = split(command)
        if words[0] != "./run_train.sh" or ("wandb" in command and not has_trackers):
            continue
        if "--job.output_dir" not in words:
            words += ["--job.output_dir", f"outputs/run{number}"]
        done = subprocess.run(
            [sys.executable, "-m", "switchtitan", "train", *words[1:], *SMALL],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRACKIO_DIR": str(folder / "tk")}
            | variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_traces_have_a_summary(outputs):
    for logs in outputs.glob("outputs/*/tensorboard"):
        (summary,) = json.loads((logs / "profile_summary.json").read_text())
        assert summary["num_steps"] == 3
        assert "## Time per region" in (logs / "profile_summary.md").read_text()
        assert len(list(logs.glob("rank0.*.pt.trace.json"))) == 1


def test_tensorboard_shows_the_groups_and_pictures_of_the_page(outputs):
    (command,) = [command for command in COMMANDS if command.startswith("tensorboard")]
    with closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", *command.split()[1:], "--port", str(port)]
    with subprocess.Popen(
        words, cwd=outputs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as board:
        try:
            scalars = ask(port, "scalars", lambda tags: "time/step_ms" in str(tags))
            images = ask(port, "images", lambda tags: "profile/memory" in str(tags))
        finally:
            board.terminate()
    assert {"run0/tensorboard", "interval_10/tensorboard"} <= set(scalars)
    groups = {tag.partition("/")[0] for tags in scalars.values() for tag in tags}
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`.*?) \|", PAGE))))
    assert groups <= named | {"basics"}, groups
    assert {"basics", "time", "gradient_norm", "merged_share", "switch"} <= groups
    assert {"profile/regions", "profile/operations"} <= set(images["interval_10/tensorboard"])


def ask(port: int, plugin: str, is_complete) -> dict:
    """The tags of a plugin, by run, when the server has read them."""
    for _ in range(120):
        time.sleep(0.5)
        try:
            address = f"http://localhost:{port}/data/plugin/{plugin}/tags"
            with urllib.request.urlopen(address) as answer:
                tags = json.loads(answer.read())
        except OSError:
            continue
        if is_complete(tags):
            return tags
    raise AssertionError(f"TensorBoard did not show {plugin}")
