"""Commands, keys and files that the README and docs/ name exist."""

import re
import shutil
from pathlib import Path

from switchtitan.cli.main import COMMANDS
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import check_plan
from switchtitan.config.fields import dotted_keys
from switchtitan.config.load import section_types
from switchtitan.job.config import JobConfig

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What docs/USAGE.md shows as mistakes, and what stands for any key.
NOT_KEYS = {"optimizer.learning_rate", "training.step", "section.key"}


def named(pattern):
    """Everything that `pattern` matches on a page, by page."""
    return {(page.name, match) for page in PAGES for match in re.findall(pattern, page.read_text())}


def all_keys():
    keys = set()
    for section, chosen in section_types(JobConfig).items():
        for config_type in chosen.values() if isinstance(chosen, dict) else [chosen]:
            keys |= set(dotted_keys({section: config_type}))
    return keys


def test_keys_on_command_lines_exist():
    found = named(r"--(\w+\.\w+)")
    assert ("USAGE.md", "training.steps") in found
    assert not {(page, key) for page, key in found if key not in all_keys() | NOT_KEYS}


def test_keys_named_with_their_section_exist():
    found = named(r"`\[(\w+)\] (\w+)")
    keys = all_keys()
    assert not {(page, key) for page, key in found if ".".join(key) not in keys}


def test_commands_exist():
    found = {
        (page, words) for page, words in named(r"(?m)^switchtitan ([\w-]+)") if words != "pretrains"
    }
    found |= named(r"`switchtitan ([\w-]+)")
    assert {command for _, command in found} >= {"train", "export", "compare", "benchmark", "plot"}
    assert not {(page, command) for page, command in found if command not in COMMANDS}


def test_the_comparison_shown_is_valid_and_with_several_keys_too(tmp_path):
    shown, several_keys, finished_runs = re.findall(
        r"(?ms)^```toml\n(.*?)^```", (ROOT / "docs" / "COMPARISONS.md").read_text()
    )
    axes, row = several_keys.split("[[rows]]")
    top, first, _, *others = shown.split("[[rows]]")
    extended = "[[rows]]".join([top + axes + finished_runs, first, row, *others])
    file = tmp_path / "shown.toml"
    shutil.copy(
        ROOT / "train_configs" / "comparisons" / "llama_1m_pystdlib.toml", tmp_path / "base.toml"
    )
    for text, num_tuned in ((shown, 1), (extended, 3)):
        file.write_text(text)
        comparison = load_comparison(file)
        check_plan(comparison)
        names = [row.name for row in comparison.rows]
        assert names == ["full_rank", "lora-r16", "lora-r16-balanced"]
        assert len(comparison.row("lora-r16").values) == num_tuned


def test_files_named_exist():
    found = named(r"(?<![\w./])((?:train_configs|scripts|switchtitan|tests|docs)/[\w./]+\.\w+)")
    shown = re.compile(r"^# (?:in )?switchtitan/\S+", re.MULTILINE).findall(
        (ROOT / "docs/EXTENDING.md").read_text()
    )
    added = {line.removeprefix("# ") for line in shown}
    missing = {
        (page, file) for page, file in found if not (ROOT / file).exists() and file not in added
    }
    assert not missing
