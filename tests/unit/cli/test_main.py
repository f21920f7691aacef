"""The console script: commands, help without torch, misspelt commands."""

import contextlib
import importlib
import subprocess
import sys

import pytest

from switchtitan.cli.main import COMMANDS, main
from switchtitan.cli.plot import PICTURES

NUM_IMPORTED_TO_TRAIN = 116
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
    assert importlib.import_module(f"switchtitan.cli.{command}").main
    with contextlib.suppress(SystemExit):  # argparse's way to end after --help
        main([command, "--help"])
    assert f"switchtitan {command}" in capsys.readouterr().out


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
