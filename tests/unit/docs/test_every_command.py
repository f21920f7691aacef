"""Every command that the README and docs/ show is run by a test, or read by its real parser."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.command_readers import READERS, ROOT, Shown, read, read_script, shown, shown_on

from switchtitan.errors import UserError

RUN_BY = {
    "docs/CONTINUE.md": "tests/end_to_end/test_continue_page.py",
    "docs/DATA.md": "tests/unit/docs/test_data_page.py",
    "docs/OBSERVE.md": "tests/end_to_end/test_observe.py",
}
"""Pages whose commands have a test of their own."""


def pages() -> list[str]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in found]


def others() -> list[Shown]:
    """The commands of pages that have no test of their own."""
    return [
        command
        for page in pages()
        if page not in RUN_BY
        for command in shown_on((ROOT / page).read_text())
    ]


COMMANDS = list({shlex.join(command.words): command for command in others()}.values())
SLOW = {"./scripts/test.sh", "scripts/measure_performance.sh"}
"""Start pytest several times, or read all measurements."""
CASES = [
    pytest.param(
        command,
        id=shlex.join(command.words),
        marks=() if command.reader in SLOW else [],
    )
    for command in COMMANDS
]


@pytest.mark.parametrize("command", CASES)
def test_a_parser_takes_every_command_and_refuses_another_option(
    command: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    read(command, tmp_path / "a")
    wrong = command._replace(words=[*command.words, "--no-such-option", "1"])
    with pytest.raises((SystemExit, UserError, AssertionError)):
        read(wrong, tmp_path / "b")


def test_every_measurement_gives_options_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    read_script(shown("scripts/measure_performance.sh"), tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    script = (ROOT / "scripts" / "measure_performance.sh").read_text()
    names = set(re.findall(r"(?m)^measure_(\w+)\(\)", script)) - {"ranks"}
    files = [Path(word).stem for call in calls for word in json.loads(call) if ".json" in word]
    assert set(files) == names


@pytest.mark.parametrize("page", RUN_BY)
def test_a_page_with_a_test_of_its_own_is_read_by_it(page: str) -> None:
    assert Path(page).name in (ROOT / RUN_BY[page]).read_text()


def test_a_command_without_a_reader_is_found(tmp_path: Path) -> None:
    (unknown,) = shown_on("```bash\nswitchtitan fly --high\n```\n")
    with pytest.raises(KeyError, match="fly"):
        read(unknown, tmp_path)


def test_no_reader_is_left_over() -> None:
    assert {command.reader for command in COMMANDS} == set(READERS)
