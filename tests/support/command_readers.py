"""The commands that a page shows, and for each kind the real parser that reads it.

What can run here runs in the tests of the page or of the command. Slurm, several machines and hours
of training cannot; their options are parsed as the command parses them."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import generate_docs
from tensorboard.default import get_plugins
from tensorboard.program import TensorBoard
from torch.distributed.run import get_args_parser

from switchtitan.benchmark.acceptance import __main__ as acceptance
from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.cli import benchmark, compare, estimate
from switchtitan.cli.prepare import read_data_config
from switchtitan.job.checks import checks_without_device
from switchtitan.job.config import parse_arguments

ROOT = Path(__file__).parents[2]
RANKS_PER_NODE = 8
CONFIG = "train_configs/llama_60m_switchlora.toml"
"""Stands for FILE on a page."""
RECORDER = """\
#!{python}
import json, sys
if sys.argv[1] == "-c":
    print(1)  # the number of cores
else:
    with open("{calls}", "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    if "--json" in sys.argv:
        open(sys.argv[sys.argv.index("--json") + 1], "w").write("{{}}")
"""
"""Writes its arguments, one call a line; stands for the interpreter of the environment."""


class Shown(NamedTuple):
    """A command of a page."""

    variables: dict[str, str]
    """What is set before the command."""
    words: list[str]

    @property
    def reader(self) -> str:
        """The key of `READERS`."""
        program, *words = self.words
        if program != "switchtitan":
            return program
        num_words = 2 if words[:1] in (["plot"], ["benchmark"]) else 1
        return " ".join([program, *words[:num_words]])


def shown(line: str) -> Shown:
    words, variables = shlex.split(line, comments=True), {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return Shown(variables, words)


def shown_on(text: str) -> list[Shown]:
    """All commands in blocks of shell commands."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shown(line) for line in lines if line.strip() and not line.startswith("#")]


def read_training(words: Sequence[str], num_ranks: int) -> None:
    parse_arguments(words, num_ranks, checks=checks_without_device(num_ranks))


def read_run_train(command: Shown, folder: Path) -> None:
    num_nodes = int(command.variables.get("NNODES", 0))
    assert num_nodes == 0 or command.variables.keys() == {"NNODES", "RDZV_ENDPOINT"}
    read_training(command.words[1:], num_nodes * RANKS_PER_NODE or 1)


def read_sbatch(command: Shown, folder: Path) -> None:
    """Slurm's options are not checked, except that they count nodes and GPUs."""
    place = command.words.index("scripts/slurm/train.sbatch")
    options = dict(word.removeprefix("--").split("=") for word in command.words[1:place])
    num_ranks = int(options["nodes"]) * int(options["gpus-per-node"])
    read_training(command.words[place + 1 :], num_ranks)


def read_srun(command: Shown, folder: Path) -> None:
    """Runs it as rank 9 of 16, with a stand-in for the interpreter of the environment."""
    call = folder / "call.json"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(call)!r}, 'w'))\n"
    )
    python.chmod(0o755)
    given = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    subprocess.run(command.words[1:], cwd=folder, env=os.environ | given, check=True, timeout=60)
    words, variables = json.loads(call.read_text())
    assert [variables[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]
    assert words[:3] == ["-m", "switchtitan", "train"]
    read_training(words[3:], num_ranks=16)


def read_export_of_variables(command: Shown, folder: Path) -> None:
    names = [word.partition("=")[0] for word in command.words[1:]]
    assert names == ["MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"]


def read_sides(options: Namespace, overrides: dict[str, list[str]], num_ranks: int) -> None:
    given = getattr(options, "configs", None) or [options.config]
    sides = [re.sub(r"^FILE\b", CONFIG, side) for side in given]
    load_sides(sides, overrides, num_ranks, checks_without_device(num_ranks))


def read_benchmark(words: Sequence[str], num_ranks: int = 1) -> None:
    own, overrides = split_overrides(words)
    options = benchmark.read_options(own)
    if options.command.reads_configs:
        read_sides(options, overrides, getattr(options, "num_ranks", num_ranks))
    else:
        assert not overrides


def read_estimate(words: Sequence[str]) -> None:
    own, overrides = split_overrides(words)
    options = estimate.read_options(own)
    read_sides(options, overrides, options.world_size)


def read_compare(command: Shown, folder: Path) -> None:
    compare.load_all(compare.read_options(command.words[2:]).files)


def read_prepare(command: Shown, folder: Path) -> None:
    read_data_config(command.words[2:])


def read_tensorboard(command: Shown, folder: Path) -> None:
    TensorBoard(get_plugins()).configure(command.words)


def read_pytest(words: Sequence[str]) -> None:
    """pytest reads all options before it lists the markers."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--markers"],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode())


def read_call(words: list[str]) -> None:
    """Reads a call of Python that a script makes."""
    match words:
        case ["scripts/benchmark.py", *rest]:
            read_benchmark(rest)
        case ["scripts/estimate.py", *rest]:
            read_estimate(rest)
        case ["-m", "torch.distributed.run", *rest]:
            options = get_args_parser().parse_args(rest)
            assert options.training_script == "scripts/benchmark.py"
            read_benchmark(options.training_script_args, int(options.nproc_per_node))
        case ["-m", "pytest", *rest]:
            read_pytest(rest)
        case ["-m", "switchtitan.benchmark.acceptance", *rest]:
            acceptance.read_options(rest)
        case _:
            assert words == ["scripts/generate_docs.py"], words


def read_script(command: Shown, folder: Path) -> None:
    """Runs a script of the shell with a stand-in for Python, and reads what it calls."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    calls, python = folder / "calls", folder / "python"
    python.write_text(RECORDER.format(python=sys.executable, calls=calls))
    python.chmod(0o755)
    with (folder / "scripts" / "setup_env.sh").open("a") as file:
        file.write(f"prepare_environment() {{ PYTHON={shlex.quote(str(python))}; }}\n")
    done = subprocess.run(
        ["bash", *command.words], cwd=folder, capture_output=True, timeout=120, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    for line in calls.read_text().splitlines():
        read_call(json.loads(line))


def read_python(command: Shown, folder: Path) -> None:
    """Runs the script; what it would write in docs/ is only compared."""
    _, script, *words = command.words
    assert script == "scripts/generate_docs.py"
    generate_docs.main([*words, "--check"])


def read_by_module(command: Shown, folder: Path) -> None:
    """Reads the options of a command of `switchtitan` whose module has `read_options`."""
    _, *names = command.reader.split()
    module = importlib.import_module("switchtitan.cli." + "_".join(names).replace("-", "_"))
    module.read_options(command.words[1 + len(names) :])


READERS: dict[str, Callable[[Shown, Path], None]] = {
    "./run_train.sh": read_run_train,
    "sbatch": read_sbatch,
    "export": read_export_of_variables,
    "srun": read_srun,
    "./scripts/test.sh": read_script,
    "scripts/gpu_acceptance.sh": read_script,
    "scripts/measure_performance.sh": read_script,
    "python": read_python,
    "tensorboard": read_tensorboard,
    "switchtitan benchmark step": lambda command, _: read_benchmark(command.words[2:]),
    "switchtitan benchmark communication": lambda command, _: read_benchmark(command.words[2:]),
    "switchtitan estimate": lambda command, _: read_estimate(command.words[2:]),
    "switchtitan compare": read_compare,
    "switchtitan prepare": read_prepare,
    "switchtitan doctor": read_by_module,
    "switchtitan evaluate": read_by_module,
    "switchtitan export": read_by_module,
    "switchtitan generate": read_by_module,
    "switchtitan geometry": read_by_module,
    "switchtitan lm-eval": read_by_module,
    "switchtitan plot run": read_by_module,
    "switchtitan plot spectrum": read_by_module,
}


def read(command: Shown, folder: Path) -> None:
    """Reads a command with its parser.

    Raises:
        SystemExit, UserError: if the parser refuses it.
        KeyError: if the command has no reader.
    """
    READERS[command.reader](command, folder)
