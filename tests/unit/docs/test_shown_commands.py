"""The commands for trained models that docs/USAGE.md and the README show run as shown."""

import importlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.commands import run
from support.reported import finish_comparison, write_grid, write_run
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
