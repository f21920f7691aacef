import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "prepare_dataset.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.prepare")


def write_text(folder: Path) -> Path:
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"This is document {number}.\n" * 20)
    return folder


def test_a_corpus_is_prepared_and_summarized(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--dataset",
        "text",
        "--path",
        str(write_text(tmp_path)),
    ]
    command += ["--vocab_size", "270", "--cache_dir", str(tmp_path / "corpora")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    labels = [line.split()[0] for line in result.stdout.splitlines()]
    assert labels == ["folder", "source", "tokenizer", "train", "validation", "fingerprint"]
    assert "3 documents" in result.stdout
    (index,) = (tmp_path / "corpora").glob("text-*/index.json")
    assert str(index.parent) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "textt"], '--dataset textt: expected one of .* did you mean "text"'),
        (["--data.pth", "x"], "--data.pth x: unknown key; did you mean path"),
        (["--dataset", "text", "--path", "/no/such/folder"], "no such file or folder"),
        (["--config", "missing.toml"], "no such file"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert re.search(message, errors)


def test_the_data_section_of_a_training_file_is_used(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    quickstart = ROOT / "train_configs" / "llama_quickstart_switchlora.toml"
    file.write_text(quickstart.read_text())
    plain = script.read_data_config(["--config", str(file)])
    changed = script.read_data_config(
        ["--config", str(file), "--seq_len", "99", "--data.max_bytes", "7"]
    )
    assert changed == plain.model_copy(update={"seq_len": 99, "max_bytes": 7})


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_lists_the_keys_without_their_section(
    script: ModuleType, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.read_data_config([option]) is None
    text = capsys.readouterr().out
    assert "--cache_dir" in text
    assert "data.cache_dir" not in text
    assert ("--num_workers" in text) == (option == "--help-all")
