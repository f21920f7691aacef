"""The console script: commands, help without torch, misspelt commands."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys

import pytest

from switchtitan.cli import launch
from switchtitan.cli.main import COMMANDS, main
from switchtitan.cli.plot import PICTURES
from switchtitan.comparison import runner
from switchtitan.errors import EnvironmentMismatchError

NUM_IMPORTED_TO_TRAIN = 184
"""The maximum number of files of switchtitan that `switchtitan train` imports."""


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_a_sentence(argv, capsys):
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    for command, sentence in COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [command]]
        assert line.endswith(sentence)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module_and_a_help(command, capsys):
    assert importlib.import_module(f"switchtitan.cli.{command.replace('-', '_')}").main
    with contextlib.suppress(SystemExit):  # argparse's way to end after --help
        main([command, "--help"])
    assert f"switchtitan {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "generate", "lm-eval"])
def test_help_says_that_a_target_may_be_an_adapter(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    help_of_target = capsys.readouterr().out.partition("\npositional arguments:")[2]
    help_of_target = " ".join(help_of_target.partition("\noptions:")[0].split())
    assert "adapter's folder (of switchtitan or PEFT)" in help_of_target


@pytest.mark.parametrize("picture", PICTURES)
def test_every_picture_has_a_help(picture, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", picture, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: switchtitan plot {picture} ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: switchtitan trian: unknown command; did you mean 'train'?\n"),
        (
            ["xyz"],
            f"error: switchtitan xyz: unknown command; expected one of {', '.join(COMMANDS)}\n",
        ),
        (
            ["plot", "spectra"],
            "error: switchtitan plot spectra: unknown command; did you mean 'spectrum'?\n",
        ),
    ],
)
def test_an_unknown_command_names_the_nearest_one(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message


def test_help_imports_no_torch():
    code = "import sys, runpy; sys.argv = ['switchtitan', '--help']; "
    code += "runpy.run_module('switchtitan', run_name='__main__'); print(*sys.modules)"
    modules = run_python(code).splitlines()[-1].split()
    assert "torch" not in modules
    assert "pydantic" not in modules


def test_training_imports_few_files():
    code = "import sys; from switchtitan.cli import train; "
    code += "print(*(name for name in sys.modules if name.partition('.')[0] == 'switchtitan'))"
    modules = run_python(code).split()
    assert len(modules) <= NUM_IMPORTED_TO_TRAIN


@pytest.fixture
def quota_of_four(monkeypatch):
    """Four of eight cores may be used, and no variable of threads is set."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for module in ("cli.main", "cli.launch", "comparison.runner"):
        monkeypatch.setattr(f"switchtitan.{module}.num_cores", lambda: 4)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_launched_ranks_share_the_quota(quota_of_four, monkeypatch):
    threads = []
    monkeypatch.setattr(
        launch, "run_ranks", lambda options: threads.append(os.environ["OMP_NUM_THREADS"])
    )
    monkeypatch.setattr(launch, "raise_file_limit", lambda **_: None)
    for num_ranks in ("4", "2"):
        main(["launch", "--standalone", "--nproc_per_node", num_ranks, "benchmark"])
        del os.environ["OMP_NUM_THREADS"]
    assert threads == ["1", "2"]


@pytest.mark.parametrize(("command", "expected"), [("compare", 2), ("train", 4)])
def test_runs_of_a_comparison_share_the_quota(quota_of_four, monkeypatch, command, expected):
    threads = []
    module = importlib.import_module(f"switchtitan.cli.{command}")
    monkeypatch.setattr(module, "main", lambda argv: threads.append(runner.num_threads(2)))
    main([command])
    assert threads == [expected]  # another command takes all four itself


def test_a_low_limit_of_files_is_an_error_without_a_traceback(monkeypatch, capsys):
    def refuse(**_):
        raise EnvironmentMismatchError("the limit is 50")

    monkeypatch.setattr(launch, "raise_file_limit", refuse)
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--standalone", "--nproc_per_node", "2", "benchmark"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the limit is 50\n"


_ABORTS_AT_THE_END = """
import atexit, os, sys
from switchtitan.cli import main
class Aborts:
    def __del__(self):
        os.abort()
main.kept = Aborts()
atexit.register(print, "at exit")
print("before")
sys.argv[1:] = ["no-such-command"]
main.{function}()
"""


@pytest.mark.parametrize(("function", "status"), [("run", 2), ("main", -signal.SIGABRT)])
def test_what_a_failed_command_leaves_behind_does_not_change_its_status(function, status):
    code = _ABORTS_AT_THE_END.format(function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "no-such-command: unknown command" in done.stderr
    if function == "run":
        assert done.stdout.split("\n") == ["before", "at exit", ""]
