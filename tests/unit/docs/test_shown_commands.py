"""The commands that docs/USAGE.md, the README and other pages show run as shown.

Runs and configurations that a page does not name are tiny ones. Those of other commands are read by
`test_every_command.py`."""

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.commands import run
from support.reported import finish_comparison, write_grid, write_run
from support.tiny import METHOD_KEYS, TINY
from support.trained import save_run

ROOT = Path(__file__).parents[3]
SHOWN_RUN = "outputs/llama_quickstart_switchlora"
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
COMMANDS = ("evaluate", "generate", "lm-eval")


PAGES = ("README.md", "docs/USAGE.md")


def shown_commands(commands: Sequence[str] = COMMANDS, pages: Sequence[str] = PAGES) -> list[str]:
    """Every `switchtitan COMMAND ...` in a block of shell commands, without its comment."""
    text = "\n".join((ROOT / name).read_text() for name in pages)
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = tuple(f"switchtitan {command} " for command in commands)
    return [line.partition(" #")[0].strip() for line in lines if line.startswith(starts)]


@pytest.fixture(scope="module")
def folder(corpora: Path) -> Path:
    """A working directory with a tiny run in place of the quickstart's."""
    folder = corpora / "shown"
    save_run(folder, "switchlora", "--job.output_dir", str(folder / SHOWN_RUN), num_steps=3)
    (folder / "README.md").write_text((ROOT / "README.md").read_text())
    tasks = folder / "my_tasks"
    tasks.mkdir()
    (tasks / "texts.json").write_text(json.dumps([{"text": "import json"}]))
    (tasks / "my_task.yaml").write_text(TASK.format(file=tasks / "texts.json"))
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The working directory after every export that is shown."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for line in dict.fromkeys(shown_commands(["export"])):
            outcome = run(*shlex.split(line)[1:])
            assert outcome.status == 0, outcome.errors
            assert "as the checkpoint's, up to" in outcome.output
    return folder


def test_shown_exports_have_what_the_page_says(exported: Path) -> None:
    (merged,) = (exported / SHOWN_RUN / "exports").iterdir()
    for place in (merged, exported / "exports/small", exported / "exports/adapter/base"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in place.iterdir()
        }
    assert (exported / "exports/adapter/adapter_model.safetensors").is_file()
    assert "| method | switchlora" in (merged / "README.md").read_text()


def test_every_command_is_shown():
    assert {line.split()[1] for line in shown_commands()} == set(COMMANDS)


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_runs(line, exported, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    _, command, *arguments = shlex.split(line)
    if command == "lm-eval":
        pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
    importlib.import_module(f"switchtitan.cli.{command.replace('-', '_')}").main(arguments)
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the runs and the comparison of docs/OBSERVE.md."""
    folder = tmp_path_factory.mktemp("reported")
    for output_dir in (SHOWN_RUN, "outputs/interval_10"):
        write_run(folder / output_dir)
    (folder / "outputs" / "comparison").symlink_to(folder / "out")
    finish_comparison(write_grid(folder))
    return folder


@pytest.mark.parametrize("line", shown_commands(["report"], ["docs/OBSERVE.md"]))
def test_a_shown_report_is_written(line, reported, monkeypatch, capsys):
    monkeypatch.chdir(reported)
    importlib.import_module("switchtitan.cli.report").main(shlex.split(line)[2:])
    file = capsys.readouterr().out.strip()
    assert '"notes":[]' in Path(file).read_text()  # nothing is missing
    assert file in ("report.html", "comparison.html")


@pytest.mark.parametrize("line", shown_commands(["plot run"]))
def test_a_shown_picture_of_a_run_is_drawn(line, reported, monkeypatch):
    monkeypatch.chdir(reported)
    outcome = run(*shlex.split(line)[1:])
    assert outcome.status == 0, outcome.errors
    assert Path(line.split()[-1]).is_file()


@pytest.mark.parametrize(
    "line",
    shown_commands(["plot spectrum"], ["docs/COMPARISONS.md"])
    + shown_commands(["export"], ["docs/PERFORMANCE.md"]),
)
def test_a_command_shown_for_any_run_runs(line, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_exports = shutil.ignore_patterns("exports")
    for place in ("RUN", "outputs/RUN"):
        shutil.copytree(exported / SHOWN_RUN, tmp_path / place, ignore=without_exports)
    outcome = run(*shlex.split(line.replace("[outputs/RUN ...] ", ""))[1:])
    assert outcome.status == 0, outcome.errors
    written = "spectra.png" if line.endswith("spectra.png") else "RUN/exports"
    assert (tmp_path / written).exists()


@pytest.mark.parametrize("line", shown_commands(["geometry"], ["docs/COMPARISONS.md"]))
def test_a_shown_geometry_is_measured(line, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("outputs/RUN", "outputs/OTHER"):
        shutil.copytree(exported / SHOWN_RUN / "checkpoints", tmp_path / place / "checkpoints")
    few = ("--tokens", "64", "--random", "1", "--points", "1")
    outcome = run(*shlex.split(line.replace("[outputs/RUN ...] ", ""))[1:], *few)
    assert outcome.status == 0, outcome.errors
    (measured,) = json.loads((tmp_path / "geometry.json").read_text())["runs"]
    assert measured["activations"][0]["mean"]["linear_cka"] == pytest.approx(1)
    assert (tmp_path / "geometry.png").is_file()


# The page's ranks and numbers of ranks need a larger layer and fewer sequences than `TINY`.
SMALL = (
    *("--model.hidden_size", "72", "--model.intermediate_size", "76"),
    *("--model.num_kv_heads", "2", "--training.local_batch_size", "1"),
    *("--compile.blocks", "false", "--compile.loss", "false", "--compile.optimizer", "false"),
)


@pytest.mark.parametrize("line", shown_commands(["benchmark", "estimate"], ["docs/COMPARISONS.md"]))
def test_a_cost_shown_for_any_file_is_printed(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    keys = METHOD_KEYS["switchlora"]
    Path("FILE").write_text(TINY.format(folder=folder, method="switchlora", method_keys=keys))
    is_timed = line.startswith("switchtitan benchmark step ")
    few = ("--rounds", "2", "--steps-per-round", "1") if is_timed else ()
    outcome = run(*shlex.split(line)[1:], *SMALL, *few)
    assert outcome.status == 0, outcome.errors
    assert json.loads(outcome.output.splitlines()[-1])["command"].startswith(line)
