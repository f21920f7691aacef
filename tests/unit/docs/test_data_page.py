"""What docs/DATA.md shows: commands run as shown or are valid, and the mixture is one."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.cli import inspect
from switchtitan.cli.prepare import read_data_config
from switchtitan.data import DATASETS, DataConfig, open_corpus

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "DATA.md").read_text()
LINES = [
    line
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```", PAGE)
    for line in block.splitlines()
    if line.startswith("switchtitan ")
]


def lines_of(command: str) -> list[str]:
    return [line for line in LINES if line.split()[1] == command]


def test_every_command_is_checked() -> None:
    assert {line.split()[1] for line in LINES} == {"prepare", "inspect"}


@pytest.mark.parametrize("line", lines_of("prepare"))
def test_a_shown_preparation_is_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = read_data_config(shlex.split(line)[2:])
    assert config is not None
    assert "FOLDER" not in line or config.path == Path("FOLDER")


@pytest.mark.parametrize("line", lines_of("inspect"))
def test_a_shown_inspection_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small corpus in place of the standard library."""
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "in" / "a.jsonl", make_documents(300))
    config = DataConfig(dataset="jsonl", path=Path("in"), vocab_size=300, cache_dir=Path("other"))
    shutil.copytree(
        open_corpus(config, show_progress=False).folder, "corpora/pystdlib-0123456789ab"
    )
    shown = ROOT / "train_configs" / "llama_quickstart_switchlora.toml"
    text = shown.read_text().replace('dataset = "pystdlib"', 'dataset = "jsonl"\npath = "in"')
    (tmp_path / shown.name).write_text(text.replace("seq_len = 256", "seq_len = 32"))
    inspect.main(shlex.split(line)[2:])
    assert "fingerprint" in capsys.readouterr().out


def test_the_mixture_shown_is_one() -> None:
    tomli = pytest.importorskip("tomli")
    (shown,) = re.findall(r"(?ms)^```toml\n(.*?)^```", PAGE)
    config = DataConfig.model_validate(tomli.loads(shown)["data"])
    assert [source.weight for source in config.sources] == [0.8, 0.2]


def test_every_dataset_has_a_row() -> None:
    (table,) = re.findall(r"(?ms)^\| `\[data\] dataset`.*?\n\n", PAGE)
    assert {name for name in DATASETS if f"`{name}`" not in table} == set()
