"""docs/CONTINUE.md: its configuration and its commands, in their order, on a small model."""

import re
import shlex
from pathlib import Path

import pytest
from support.commands import run
from support.folders import save_random_model

from switchtitan.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.end_to_end

PAGE = (Path(__file__).parents[2] / "docs" / "CONTINUE.md").read_text()
SMALLER = {
    "steps = 2000": "steps = 6",
    "global_batch_size = 64": "global_batch_size = 4",
    "local_batch_size = 4": "local_batch_size = 2",
    "seq_len = 1024": "seq_len = 16\nnum_workers = 0",
    "rank = 64": "rank = 6",
    "warmup_steps = 100": "warmup_steps = 2",
}


def block(language: str) -> str:
    (shown,) = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE)
    return str(shown)


def test_the_page_works_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{number} bottles of beer on wall {number * 7}, " * 20 for number in range(60)]
    Path("texts").mkdir()
    for number, text in enumerate(texts):
        Path("texts", f"{number}.txt").write_text(text)
    folder = save_random_model("llama3, tied", Path("models/base"))
    train_tokenizer(texts, 300).tokenizer.save(str(folder / "tokenizer.json"))
    config = block("toml")
    for shown, smaller in SMALLER.items():
        assert config.count(shown) == 1
        config = config.replace(shown, smaller)
    Path("continue.toml").write_text(config)
    losses = []
    for line in block("bash").splitlines():
        program, *words = shlex.split(line)
        assert program == "switchtitan"
        outcome = run(*words)
        assert outcome.status == 0, (line, outcome.errors)
        losses += re.findall(r"(?m)^loss +([\d.]+)$", outcome.output)
    before, after = map(float, losses)
    assert after < before
    assert Path("exported/tokenizer.json").is_file()
    resumed = run("train", "--config", "outputs/continued/config.toml", "--training.steps", "7")
    assert resumed.status == 0, resumed.errors


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_every_type_is_in_the_table(kind: str) -> None:
    assert re.search(rf"(?m)^\| `{kind}`", PAGE)
