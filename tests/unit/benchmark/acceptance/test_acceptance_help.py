"""`scripts/*.sh --help` prints help, and installs nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from switchtitan.benchmark.acceptance import __main__ as program

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("name", ["gpu_acceptance", "measure_performance", "test"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_the_comment_at_the_start_and_installs_nothing(
    tmp_path: Path, name: str, option: str
) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    # Neither Python nor pip can be found: an installation would fail.
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [tmp_path / "bash", tmp_path / "scripts" / f"{name}.sh", option],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{name}.sh" in done.stdout
    assert "set -euo" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bash", "dirname", "scripts", "sed"]


def test_help_of_the_acceptance_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.read_options(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    header = (ROOT / "scripts" / "gpu_acceptance.sh").read_text().partition("set -euo")[0]
    assert options == set(re.findall(r"(?<=#   )--[a-z-]+", header))
