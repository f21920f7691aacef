"""docs/CONTINUE.md: its configuration, commands and code, in their order, on a small model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Outcome, run
from support.folders import save_random_model

from switchtitan.data.tokenizer import train_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "CONTINUE.md").read_text()
SMALLER = {
    "steps = 2000": "steps = 100",
    "global_batch_size = 64": "global_batch_size = 4",
    "local_batch_size = 4": "local_batch_size = 2",
    "seq_len = 1024": "seq_len = 16\nnum_workers = 0",
    "rank = 64": "rank = 6",
    "warmup_steps = 100": "warmup_steps = 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE)


def run_line(line: str) -> Outcome:
    program, *words = shlex.split(line, comments=True)
    assert program == "switchtitan"
    outcome = run(*words)
    assert outcome.status == 0, (line, outcome.errors)
    return outcome


def run_block(commands: str) -> dict[str, str]:
    """Runs all commands; returns what each printed, by its first two words."""
    lines = commands.replace("\\\n", " ").splitlines()
    return {" ".join(line.split()[1:3]): run_line(line).output for line in lines}


def loss_in(printed: str) -> float:
    (loss,) = re.findall(r"(?m)^loss +([\d.]+)$", printed)
    return float(loss)


def test_the_page_works_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    texts = [f"{number} bottles of beer on wall {number * 7}, " * 20 for number in range(60)]
    Path("texts").mkdir()
    for number, text in enumerate(texts):
        Path("texts", f"{number}.txt").write_text(text)
    folder = save_random_model("llama3, tied", Path("models/base"))
    train_tokenizer(texts, 300).tokenizer.save(str(folder / "tokenizer.json"))
    (config,) = blocks("toml")
    for shown, smaller in SMALLER.items():
        assert config.count(shown) == 1
        config = config.replace(shown, smaller)
    Path("continue.toml").write_text(config)
    first, second = blocks("bash")
    printed = run_block(first)
    before, after = (
        loss_in(printed[f"evaluate {of}"]) for of in ("models/base", "outputs/continued")
    )
    assert after < before - 1
    shown_code: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, shown_code)
    assert isinstance(shown_code["adapted"], peft.PeftModel)
    assert "Once upon" in printed["generate outputs/continued"]
    tokens = shown_code["tokens"]
    (line,) = re.findall(r"(?m)^switchtitan generate outputs/continued .*$", first)
    output = run_line(f"{line} --dtype float32 --json -").output
    # Commands of this process may have set the log to INFO, on stdout.
    answer = json.loads(output[output.index("{") :])
    assert tokens[0].tolist()[-len(answer["tokens"]) :] == answer["tokens"]
    with torch.no_grad():
        merged, separate = (shown_code[name](tokens).logits for name in ("model", "adapted"))
    # Merging the factors rounds each weight once.
    torch.testing.assert_close(separate, merged, rtol=1e-4, atol=1e-4)
    again = run_block(second)
    assert loss_in(again["evaluate adapter"]) == pytest.approx(after, abs=1e-4)
    resumed = run("train", "--config", "outputs/continued/config.toml", "--training.steps", "101")
    assert resumed.status == 0, resumed.errors


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_every_type_is_in_the_table(kind: str) -> None:
    assert re.search(rf"(?m)^\| `{kind}`", PAGE)
