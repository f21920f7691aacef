import re
from pathlib import Path

import pytest

from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import check_plan
from switchtitan.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]
DECLARED = sorted((REPOSITORY / "train_configs" / "comparisons").glob("*.toml"))

GRID = """
name = "two"
config = "base.toml"
output_dir = "out"
selection_seed = 1
report_seeds = [2, 3]
baseline = "dense"
[[rows]]
name = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
set.method = { name = "full_rank" }
[[rows]]
name = "thin"
learning_rates = [1e-2, 2e-2, 4e-2]
set.method = { name = "lora", rank = 4 }
[[rows]]
name = "thin-balanced"
learning_rate_of = "thin"
set.method = { name = "lora", rank = 4, init = "balanced" }
[[gaps]]
from_row = "thin"
to_row = "dense"
rows = ["thin-balanced"]
"""


def load(folder: Path, text: str):
    file = folder / "grid.toml"
    file.write_text(text)
    return load_comparison(file)


def test_the_common_configuration_is_relative_to_the_file(tmp_path):
    comparison = load(tmp_path, GRID)
    assert comparison.config == tmp_path / "base.toml"
    assert comparison.row("thin").title == "thin"
    assert comparison.row("thin").set == {"method": {"name": "lora", "rank": 4}}


@pytest.mark.parametrize(
    ("given", "changed", "message"),
    [
        (
            "report_seeds = [2, 3]",
            "report_seeds = [1, 2]",
            "selection_seed = 1 is among report_seeds",
        ),
        (
            "report_seeds = [2, 3]",
            "report_seeds = [2, 2]",
            r"report_seeds = \[2, 2\]: expected different seeds",
        ),
        ("[1e-2, 2e-2, 4e-2]", "[1e-2, 2e-2, 4e-2, 8e-2]", "dense has 3, thin has 4"),
        ("[1e-2, 2e-2, 4e-2]", "[1e-2, 2e-2]", "expected at least three, above 0 and increasing"),
        (
            "[1e-2, 2e-2, 4e-2]",
            "[4e-2, 2e-2, 1e-2]",
            "expected at least three, above 0 and increasing",
        ),
        (
            'baseline = "dense"',
            'baseline = "dens"',
            "baseline = 'dens': expected one of dense, thin",
        ),
        ('name = "thin"', 'name = "dense"', "two have the name 'dense'"),
        (
            'name = "thin"',
            'name = "th/in"',
            r"\[\[rows\]\] number 2, name = \"th/in\": expected letters",
        ),
        ('learning_rate_of = "thin"', "", "give either learning_rates or learning_rate_of"),
        (
            'learning_rate_of = "thin"',
            'learning_rate_of = "thin-balanced"',
            "expected one of dense, thin$",
        ),
        (
            'rows = ["thin-balanced"]',
            'rows = ["fat"]',
            r"gaps\.rows = 'fat': expected one of dense, thin",
        ),
        ('baseline = "dense"', 'baseline = "dense"\nseeds = 3', "seeds = 3: unknown key"),
    ],
)
def test_an_unfair_or_invalid_grid_is_refused(tmp_path, given, changed, message):
    assert GRID.count(given) == 1
    with pytest.raises(ConfigError, match=re.compile(message, re.MULTILINE)):
        load(tmp_path, GRID.replace(given, changed))


@pytest.mark.parametrize(
    "file",
    [file for file in DECLARED if "[[rows]]" in file.read_text()],
    ids=lambda file: file.stem,
)
def test_the_shipped_comparisons_are_valid(file):
    comparison = load_comparison(file)
    check_plan(comparison)
    assert len(comparison.report_seeds) >= 3


def test_a_missing_file_and_one_without_enough_rows_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"grid.toml: no such file; expected the TOML file that declares"
    ):
        load_comparison(tmp_path / "grid.toml")
    training = REPOSITORY / "train_configs" / "llama_60m_lora.toml"
    with pytest.raises(
        ConfigError,
        match=r"llama_60m_lora.toml: declares no comparison, because it has no \[\[rows\]\]",
    ):
        load_comparison(training)
    second_row = GRID.index("[[rows]]", GRID.index("[[rows]]") + 1)
    with pytest.raises(ConfigError, match=r"expected at least two \[\[rows\]\]"):
        load(tmp_path, GRID[:second_row])
