"""The script of `switchtitan completion bash` completes words in a real bash."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.commands import run

from switchtitan.cli.main import COMMANDS
from switchtitan.methods import METHODS


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = run("completion", "bash")
    assert (outcome.status, outcome.errors) == (0, "")
    file = tmp_path_factory.mktemp("completion") / "script"
    file.write_text(outcome.output)
    return file


def in_bash(script: Path, code: str) -> str:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "--norc", "-c", f"source {script}\n{code}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def completed(script: Path, line: str) -> list[str]:
    """The completions of the last word of a line, which may be empty, as bash asks for them."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    return in_bash(
        script,
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        f"_switchtitan switchtitan '{words[-1]}' '{words[-2]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ).split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("switchtitan tr", ["train"]),
        ("switchtitan train --training.st", ["--training.steps"]),
        ("switchtitan train --method.rese", ["--method.reset_interval", "--method.reset_moments"]),
        ("switchtitan train --config run.toml --dry", ["--dry-run"]),
        ("switchtitan train --dry-run --conf", ["--config"]),
        ("switchtitan train --method.name swi", ["switchlora"]),
        ("switchtitan train --compile.blocks ", ["true", "false"]),
        ("switchtitan launch --nproc_per_node 2 tr", ["train"]),
        ("switchtitan launch --nproc_per_node 2 train --training.st", ["--training.steps"]),
        ("switchtitan prepare --vocab", ["--vocab_size"]),
        ("switchtitan evaluate outputs/run --spl", ["--split"]),
        ("switchtitan export run --dtype ", ["float32", "bfloat16"]),
        ("switchtitan plot sp", ["spectrum"]),
        ("switchtitan benchmark step --rounds", ["--rounds"]),
        ("switchtitan completion ", ["bash", "zsh", "fish"]),
        # Nothing here: bash then completes file names.
        ("switchtitan train --config ", []),
        ("switchtitan train --config tr", []),
        ("switchtitan evaluate ", []),
        ("switchtitan export tr", []),
        ("switchtitan train --nothing.lik", []),
    ],
)
def test_words_are_completed(script: Path, line: str, expected: list[str]) -> None:
    assert sorted(completed(script, line)) == sorted(expected)


def test_every_command_and_method_is_completed(script: Path) -> None:
    assert set(completed(script, "switchtitan ")) == {*COMMANDS, "--help", "--version"}
    assert completed(script, "switchtitan train --method.name ") == list(METHODS)
    for command in COMMANDS:
        assert "--help" in completed(script, f"switchtitan {command} --h")


def test_file_names_are_completed_where_the_script_has_no_word(script: Path) -> None:
    assert in_bash(script, "complete -p switchtitan").strip() == (
        "complete -o default -F _switchtitan switchtitan"
    )


def test_the_other_shells_get_the_same_words(script: Path) -> None:
    zsh = run("completion", "zsh").output
    assert zsh.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    assert zsh.endswith(script.read_text())
    fish = run("completion", "fish").output.splitlines()
    train = "complete -c switchtitan -n '__fish_seen_subcommand_from train' -l"
    assert f"{train} training.steps" in fish
    assert f"{train} compile.blocks -x -a 'true false'" in fish
    assert run("completion", "csh").status == 2
