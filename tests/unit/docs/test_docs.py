"""Commands, options, keys and files that the README and docs/ name exist."""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import tomli
from support.commands import succeed

from switchtitan.config import flatten, section_types
from switchtitan.job.config import JobConfig
from switchtitan.workbench.comparison.comparison import check_plan
from switchtitan.workbench.comparison.config import load_comparison

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What docs/USAGE.md shows as mistakes, and what stands for any key.
NOT_KEYS = {"optimizer.learning_rate", "training.step", "section.key"}
SECTIONS = set(JobConfig.model_fields)


def named(pattern):
    """Everything that `pattern` matches on a page, by page."""
    return {(page.name, match) for page in PAGES for match in re.findall(pattern, page.read_text())}


@cache
def all_keys():
    return {
        f"{section}.{key}"
        for section, types in section_types(JobConfig).items()
        for config_type in types.values()
        for key in config_type.model_fields
    }


def test_keys_exist():
    found = named(r"--(\w+\.\w+)")
    found |= {(page, ".".join(key)) for page, key in named(r"`\[(\w+)\] (\w+)")}
    # docs/EXTENDING.md adds keys, and tests/end_to_end/test_extending.py trains with them.
    for page in (page for page in PAGES if page.name != "EXTENDING.md"):
        for block in re.findall(r"(?ms)^```toml\n(.*?)^```", page.read_text()):
            sections = {name: of for name, of in tomli.loads(block).items() if name in SECTIONS}
            found |= {(page.name, key) for key in flatten(sections)}
    assert {("USAGE.md", "training.steps"), ("DATA.md", "data.sources")} <= found
    unknown = {(page, key) for page, key in found if key not in all_keys() | NOT_KEYS}
    # docs/LOG.md names keys that were removed.
    assert not {(page, key) for page, key in unknown if page != "LOG.md"}


def shown_commands():
    """The words of every `switchtitan COMMAND ...` in a block of shell commands."""
    for page in PAGES:
        for block in re.findall(r"(?ms)^```bash\n(.*?)^```", page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("switchtitan "):
                    yield line.partition(" #")[0].split()[1:]


SHOWN = list(shown_commands())


@pytest.mark.parametrize("command", sorted({words[0] for words in SHOWN}))
def test_options_of_shown_commands_exist(command):
    for words in (words for words in SHOWN if words[0] == command):
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        start = words[:2] if command == "benchmark" else words[:1]
        listed = set(re.findall(r"--[\w-]+", succeed(*start, "--help").output))
        sections_omitted = {f"--{key.rpartition('.')[2]}" for key in all_keys()}
        of_data = sections_omitted if command == "prepare" else set()
        assert {option for option in options if "." not in option} <= listed | of_data


def test_files_exist():
    found = named(r"(?<![\w./])((?:train_configs|scripts|switchtitan|docs|tests)/[\w./]+\.\w+)")
    guide = (ROOT / "docs" / "EXTENDING.md").read_text()
    added = set(re.findall(r"(?m)^# (switchtitan/\S+)", guide))
    assert not {
        (page, file) for page, file in found if not (ROOT / file).exists() and file not in added
    }


def test_the_comparison_shown_is_valid_and_with_several_keys_too(tmp_path):
    page = (ROOT / "docs" / "COMPARISONS.md").read_text()
    shown, several_keys, finished_runs = re.findall(r"(?ms)^```toml\n(.*?)^```", page)
    axes, row = several_keys.split("[[rows]]")
    top, first, _, *others = shown.split("[[rows]]")
    extended = "[[rows]]".join([top + axes + finished_runs, first, row, *others])
    base = ROOT / "train_configs" / "comparisons" / "llama_1m_pystdlib.toml"
    shutil.copy(base, tmp_path / "base.toml")
    for text in (shown, extended):
        (tmp_path / "shown.toml").write_text(text)
        check_plan(load_comparison(tmp_path / "shown.toml"))
