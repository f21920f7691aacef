"""transformers computes the same logits from an exported checkpoint."""

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.checkpoints import rewrite_metadata
from support.commands import run
from support.trained import train_and_save
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.export")


TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 270


def logits_of_a_saved_run(folder: Path, method: str) -> torch.Tensor:
    trainer = train_and_save(folder, method)
    with torch.no_grad():
        return trainer.stepper.model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))


@pytest.mark.parametrize("method", ["full_rank", "lora", "switchlora"])
def test_transformers_computes_the_same_logits_from_an_export(
    script: ModuleType, corpora: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corpora / f"export-{method}"
    ours = logits_of_a_saved_run(folder, method)
    script.main([str(folder / "run")])
    exported = folder / "run" / "exports" / "step-000000007"
    assert str(exported) in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    # Merging rounds each weight once, about 1e-7 relative; 1e-5 is what two LLaMAs in float32
    # differ by.
    torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-5, atol=1e-5)
    text = "def sorted(values):\n    return values\n"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_weights_are_stored_in_the_requested_dtype(
    script: ModuleType, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits_of_a_saved_run(corpora / "export-bfloat16", "switchlora")
    checkpoint = corpora / "export-bfloat16" / "run" / "checkpoints" / "step-000000007"
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--folder",
        str(tmp_path / "out"),
        "--dtype",
        "bfloat16",
    ]
    script.main(arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_an_export_without_the_corpus_reports_no_tokenizer(
    script: ModuleType, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits_of_a_saved_run(corpora / "export-alone", "full_rank")
    checkpoint = corpora / "export-alone" / "run"

    def move_corpus(metadata: dict[str, Any]) -> None:
        run = re.sub(
            r'cache_dir = \\"[^"]*\\"', r'cache_dir = \\"elsewhere\\"', json.dumps(metadata["run"])
        )
        metadata["run"] = json.loads(run)

    rewrite_metadata(checkpoint / "checkpoints" / "step-000000007", move_corpus)
    script.main(["--checkpoint", str(checkpoint), "--folder", str(tmp_path / "out")])
    assert "none: the run's corpus is not at elsewhere/pystdlib-" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such/run"], "no complete checkpoint at no/such/run: expected"),
        ([], "one of the arguments CHECKPOINT --checkpoint is required"),
        (
            ["--checkpoint", "x", "--dtype", "float16"],
            "argument --dtype: invalid choice: 'float16'",
        ),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments CHECKPOINT --checkpoint is required"),
        (["a", "--checkpoint", "b"], "not allowed with argument"),
    ],
)
def test_one_checkpoint_is_given_by_position_or_by_name(
    script: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.read_options(["a"]).checkpoint == Path("a")
    assert script.read_options(["--checkpoint", "a"]).checkpoint == Path("a")
    with pytest.raises(SystemExit) as stopped:
        script.read_options(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(corpora: Path) -> Path:
    logits_of_a_saved_run(corpora / "export-stopped", "switchlora")
    return corpora / "export-stopped" / "run"


@pytest.mark.parametrize("place", ["file/x", "/proc/x"])
def test_a_folder_that_cannot_be_written_is_one_message(
    saved: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    run("export", saved, "--folder", tmp_path / place).check_refused(place, "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


_EXPORT_AND_STOP = """
import os, signal, sys
from switchtitan.cli import export, main

# Shells start background jobs with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal_number = int(sys.argv.pop())
if signal_number:
    export.write_model_card = lambda *args: os.kill(os.getpid(), signal_number)
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (0, 0)]
)
def test_a_stopped_export_is_one_line_and_leaves_nothing(
    saved: Path, tmp_path: Path, signal_number: int, status: int
) -> None:
    words = ["export", str(saved), "--folder", str(tmp_path / "out"), str(int(signal_number))]
    ended = subprocess.run(
        [sys.executable, "-c", _EXPORT_AND_STOP, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    # The control is an export without a signal.
    interrupted = "interrupted; run the same command to export" in ended.stderr
    assert interrupted == bool(signal_number)
    assert [path.name for path in tmp_path.iterdir()] == ([] if signal_number else ["out"])
