import re
from pathlib import Path

import pytest

from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import check_plan, plan_run
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
        ('learning_rate_of = "thin"', "", "row thin-balanced has no learning rate; give"),
        (
            'learning_rate_of = "thin"',
            'learning_rate_of = "thin"\nset.optimizer = { lr = 1e-2 }',
            "give either learning_rate_of = 'thin' or set.optimizer.lr, not both",
        ),
        (
            'learning_rate_of = "thin"',
            'learning_rate_of = "thin"\nlearning_rates = [1e-2, 2e-2, 4e-2]',
            "give either learning_rate_of = 'thin' or optimizer.lr, not both",
        ),
        (
            'name = "thin-balanced"',
            'name = "thin-balanced"\nlabel = "thin"',
            "two have the label 'thin'",
        ),
        (
            'learning_rate_of = "thin"',
            'learning_rate_of = "thin-balanced"',
            "thin-balanced': that row chooses no values itself; repeat its values",
        ),
        (
            'rows = ["thin-balanced"]',
            'rows = ["fat"]',
            r"gaps\.rows = 'fat': expected one of dense, thin",
        ),
        ('baseline = "dense"', 'baseline = "dense"\nseeds = 3', "seeds = 3: unknown key"),
        (
            'baseline = "dense"',
            'baseline = "dense"\ndiffer_in = ["data"]',
            r'differ_in = \["data"\]: expected',
        ),
        (
            'baseline = "dense"',
            'baseline = "dense"\naxes = ["optimizer.lr", "optimizer.other_lr"]',
            "axes: no row tunes 'optimizer.other_lr'; remove it",
        ),
        (
            'baseline = "dense"',
            'baseline = "dense"\naxes = ["optimizer.lr", "training.steps"]',
            r"axes: 'training.steps': expected a key of \[method\] or \[optimizer\]",
        ),
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


OTHER = 'tune."optimizer.other_lr" = [1e-3, 2e-3, 4e-3]'
DECAY = 'tune."optimizer.weight_decay" = [0.0, 0.1]'
AXES = 'axes = ["optimizer.lr", "optimizer.other_lr", "optimizer.weight_decay"]'


def grid_of(axes: str, dense: str, thin: str = "") -> str:
    grid = GRID.replace('baseline = "dense"', f'baseline = "dense"\n{axes}')
    for rates, keys in (("[1e-3, 2e-3, 4e-3]", dense), ("[1e-2, 2e-2, 4e-2]", thin)):
        grid = grid.replace(f"learning_rates = {rates}", f"learning_rates = {rates}\n{keys}")
    return grid


def test_the_values_of_several_keys_are_declared_by_row(tmp_path):
    start = 'start."optimizer.weight_decay" = 0.1'
    comparison = load(tmp_path, grid_of(AXES, f"{OTHER}\n{DECAY}\n{start}", OTHER))
    dense, thin, balanced = comparison.rows
    assert dense.values == {
        "optimizer.lr": (1e-3, 2e-3, 4e-3),
        "optimizer.other_lr": (1e-3, 2e-3, 4e-3),
        "optimizer.weight_decay": (0.0, 0.1),
    }
    assert dense.start_values == {
        "optimizer.lr": 2e-3,
        "optimizer.other_lr": 2e-3,
        "optimizer.weight_decay": 0.1,
    }
    # Of two values, the lower one is the middle.
    without_start = load(tmp_path, grid_of(AXES, f"{OTHER}\n{DECAY}", OTHER)).rows[0]
    assert without_start.start_values["optimizer.weight_decay"] == 0.0
    assert set(thin.values) == {"optimizer.lr", "optimizer.other_lr"}
    assert balanced.values == {}
    assert comparison.tuned_row(balanced) == thin


def test_learning_rates_are_another_name_for_their_axis(tmp_path):
    by_key = GRID.replace("learning_rates = [1e-3", 'tune."optimizer.lr" = [1e-3')
    assert load(tmp_path, by_key).rows[0].values == load(tmp_path, GRID).rows[0].values


@pytest.mark.parametrize(
    ("axes", "dense", "thin", "message"),
    [
        (AXES, f"{OTHER}\n{DECAY}", OTHER.replace(", 4e-3", ", 4e-3, 8e-3"),
         "tunes optimizer.other_lr must have the same number of values, for fairness: "
         "dense has 3, thin has 4"),
        (AXES, f"{OTHER}\n{DECAY}", DECAY.replace("0.1", "0.1, 0.2"), "dense has 2, thin has 3"),
        (AXES, f"{OTHER}\n{DECAY.replace('0.0, ', '')}", "", "expected at least two, increasing"),
        (AXES, f"{OTHER.replace('1e-3, ', '')}\n{DECAY}", "", "expected at least three, above 0"),
        (AXES, f"{OTHER}\n{DECAY.replace('0.1', 'inf')}", "", "expected finite numbers"),
        (AXES, f'{OTHER}\n{DECAY}\nstart."optimizer.weight_decay" = 0.2', "",
         r"start: optimizer.weight_decay = 0.2: expected one of \[0.0, 0.1\]"),
        (AXES, f"{OTHER}\n{DECAY}", 'start."optimizer.weight_decay" = 0.1',
         "start: the row does not tune 'optimizer.weight_decay'"),
        ("", OTHER, "", "rows.dense: tunes optimizer.other_lr, which axes does not have"),
        ("", 'tune."optimizer.lr" = [1e-3, 2e-3, 4e-3]', "",
         "give either learning_rates or tune.'optimizer.lr', not both"),
        ('axes = ["optimizer.other_lr", "optimizer.lr"]', OTHER, "",
         "rows.thin: expected values of optimizer.other_lr to choose from"),
        (AXES, f"{OTHER}\n{DECAY.replace('0.1', 'true')}", "",
         "tune: expected a table of keys, each with a list of items, each an integer or a number"),
    ],
)  # fmt: skip
def test_axes_that_are_unfair_or_do_not_fit_the_rows_are_refused(
    tmp_path, axes, dense, thin, message
):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, grid_of(axes, dense, thin))


def test_the_file_of_finished_runs_is_relative_to_the_comparison(tmp_path):
    named = GRID.replace('baseline = "dense"', 'baseline = "dense"\nfinished_runs = ["a/runs.csv"]')
    assert load(tmp_path, named).finished_runs == (tmp_path / "a" / "runs.csv",)
    several = named.replace('"a/runs.csv"', '"a/runs.csv", "b.csv"')
    assert load(tmp_path, several).finished_runs[1] == tmp_path / "b.csv"
    assert load(tmp_path, GRID).finished_runs == ()


GIVEN = "set.optimizer = { lr = 1e-2 }"


def test_a_row_may_give_its_rate_instead_of_choosing_it(tmp_path):
    both = GRID.replace('name = "dense"', f'name = "dense"\n{GIVEN}')
    with pytest.raises(ConfigError, match=r"set.optimizer.lr has no effect: the row chooses it"):
        load(tmp_path, both)
    given = both.replace("learning_rates = [1e-3, 2e-3, 4e-3]\n", "")
    assert load(tmp_path, given).rows[0].given_values["optimizer.lr"] == 1e-2
    of_given = given.replace('learning_rate_of = "thin"', 'learning_rate_of = "dense"')
    with pytest.raises(ConfigError, match="'dense': that row chooses no values itself; repeat"):
        load(tmp_path, of_given)


def test_a_row_may_give_its_rate_and_choose_another_key(tmp_path):
    axes = 'axes = ["optimizer.weight_decay"]'
    grid = re.sub("learning_rate.* = .*", f"{GIVEN}\n{DECAY}", GRID)
    rows = load(tmp_path, grid.replace("[[rows]]", f"{axes}\n[[rows]]", 1)).rows
    assert [row.values for row in rows] == [{"optimizer.weight_decay": (0.0, 0.1)}] * 3


def test_a_comparison_may_tune_nothing(tmp_path):
    fixed = re.sub("learning_rate.* = .*", "set.optimizer = { lr = 1e-2 }", GRID)
    comparison = load(tmp_path, fixed)
    assert [row.values for row in comparison.rows] == [{}, {}, {}]
    unknown = fixed.replace("[[rows]]", 'axes = ["optimizer.lrr"]\n[[rows]]', 1)
    with pytest.raises(ConfigError, match=r"axes: no row tunes 'optimizer.lrr'; remove it"):
        load(tmp_path, unknown)


def test_folders_of_shipped_comparisons_keep_their_names():
    comparison = load_comparison(REPOSITORY / "train_configs" / "comparisons" / "rank_16.toml")
    run = plan_run(comparison, comparison.row("lora-r16"), {"optimizer.lr": 5e-3}, 1)
    folder = "outputs/comparisons/llama_1m_pystdlib/runs/lora-r16/lr-0.005-seed-1"
    assert str(run.folder) == folder
    assert run.arguments[-2:] == ("--job.output_dir", folder)
    assert run.arguments[-4:-2] == ("--job.name", "lora-r16-lr-0.005-seed-1")
