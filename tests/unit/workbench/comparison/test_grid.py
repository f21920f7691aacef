"""A declared comparison: what its file may say, its runs, and the choice of values key by key."""

import math
import re
from pathlib import Path

import pytest
from support.checkpoints import refused
from support.comparisons import GRID, LR, loss_of, result_of, train, write_grid

from switchtitan.errors import ConfigError
from switchtitan.registry import toml_value
from switchtitan.workbench.comparison.comparison import check_plan, follow
from switchtitan.workbench.comparison.config import load_comparison
from switchtitan.workbench.comparison.runs import config_sha256, plan_run, read_csv

COMPARISONS = Path(__file__).parents[4] / "train_configs" / "comparisons"
OTHER, DECAY = "optimizer.other_lr", "optimizer.weight_decay"
SET_THIN = 'set.method = {{ name = "lora", rank = 4 }}\n'
OF_THIN = 'learning_rate_of = "thin"'
AXES = f'axes = ["{LR}", "{OTHER}", "{DECAY}"]'
TUNE_OTHER = f'tune."{OTHER}" = [1e-3, 2e-3, 4e-3]'
BOTH = f'{TUNE_OTHER}\ntune."{DECAY}" = [0.0, 0.1]'


def declare(folder, grid=GRID, changes=None):
    comparison = load_comparison(write_grid(folder, grid, changes))
    check_plan(comparison)
    return comparison


def with_top(line):
    return GRID.replace("[[rows]]", f"{line}\n[[rows]]", 1)


def with_axes(dense, thin="", axes=AXES):
    """The comparison with more keys to tune in the two rows that choose."""
    grid = with_top(axes)
    for rates, keys in (("[1e-3, 2e-3, 4e-3]", dense), ("[1e-2, 2e-2, 4e-2]", thin)):
        grid = grid.replace(f"learning_rates = {rates}", f"learning_rates = {rates}\n{keys}")
    return grid


def with_thin(keys, top=""):
    """The comparison with more keys in `set` of row thin."""
    return with_top(top).replace(SET_THIN, f"{SET_THIN}{keys}\n")


def test_rows_may_give_values_and_a_comparison_may_tune_nothing(tmp_path):
    grid = re.sub("learning_rate.* = .*", "set.optimizer = {{ lr = 1e-2, other_lr = 5e-3 }}", GRID)
    state, stages = train(declare(tmp_path, grid), lambda run: (2.0, 3.0))
    ((dense, *_),) = stages
    assert dense.config.optimizer.other_lr == 5e-3
    assert (dense.tuned, dense.folder.name) == ({LR: 1e-2}, "lr-0.01-seed-2")
    assert state.chosen["thin"] == {LR: 1e-2}


def test_the_shipped_comparisons_are_valid():
    files = [file for file in COMPARISONS.glob("*.toml") if not file.name.startswith("llama_")]
    assert len(files) > 1
    for file in files:
        check_plan(load_comparison(file))


def test_published_runs_stay_known_after_a_default_has_changed():
    comparison = load_comparison(COMPARISONS / "lora_alpha_python.toml")
    known = read_csv(COMPARISONS.parents[1] / "docs" / "results" / "lora_alpha_python.csv")
    assert follow(comparison, lambda run: known.get(config_sha256(run.config))).due == []


@pytest.mark.parametrize(
    ("top", "section", "key", "value"),
    [
        ("", "optimizer", "momentum", 0.9),
        ("", "compile", "optimizer", True),
        ('differ_in = ["training"]', "training", "steps", 20),
        ('differ_in = ["model"]', "model", "hidden_size", 24),
    ],
)
def test_rows_may_differ_in_these_sections_or_where_it_is_declared(
    tmp_path, top, section, key, value
):
    name = 'name = "muon", ' if section == "optimizer" else ""
    grid = with_thin(f"set.{section} = {{{{ {name}{key} = {toml_value(value)} }}}}", top)
    grid = grid.replace(SET_THIN, 'set.method = {{ name = "full_rank" }}\n')
    dense, thin = follow(declare(tmp_path, grid), lambda run: None).due[:2]
    assert getattr(getattr(thin.config, section), key) == value
    assert getattr(getattr(dense.config, section), key, None) != value


EVALUATION = "[evaluation]\ntest_tokens = 160\ninterval = 20"
SEEDS = "report_seeds = [2, 3]"
RATES = "[1e-2, 2e-2, 4e-2]"


@pytest.mark.parametrize(
    ("grid", "changes", "fragments"),
    [
        # Unfair.
        (GRID.replace(SEEDS, "report_seeds = [1, 2]"), {}, ("1, 1, 2", "different seeds")),
        (GRID.replace(RATES, "[1e-2, 2e-2, 4e-2, 8e-2]"), {}, ("dense has 3", "thin has 4")),
        (with_axes(BOTH, TUNE_OTHER.replace("4e-3", "4e-3, 8e-3")), {}, (OTHER, "thin has 4")),
        (GRID.replace(RATES, "[1e-2, 2e-2]"), {}, ("[0.01, 0.02]", "at least 3")),
        (with_axes(BOTH.replace("0.0, ", "")), {}, (DECAY, "at least 2")),
        (with_thin("set.model = {{ hidden_size = 24 }}"), {}, ("thin.set.model", "differ_in")),
        # What does not fit together.
        (GRID.replace('baseline = "dense"', 'baseline = "dens"'), {}, ("'dens'", "dense, thin")),
        (GRID.replace('name = "thin"', 'name = "dense"'), {}, ("rows.dense", "this name")),
        (GRID.replace('name = "thin"', 'name = "th/in"'), {}, ("rows[1].name", "th/in")),
        (GRID.replace(OF_THIN, ""), {}, ("thin-balanced", "no learning rate")),
        (GRID.replace(OF_THIN, f"{OF_THIN}\nlearning_rates = [1.0]"), {}, ("learning_rates and",)),
        (GRID.replace(OF_THIN, 'learning_rate_of = "no"'), {}, ("'no'", "dense, thin")),
        (with_axes(TUNE_OTHER, axes=""), {}, ("rows.dense", OTHER)),
        (with_axes(f'tune."{LR}" = [1.0]', axes=""), {}, ("learning_rates", f"'{LR}'")),
        (with_axes(BOTH, BOTH).replace(
            SET_THIN, SET_THIN + "set.optimizer = {{ weight_decay = 0.1 }}\n"), {},
         ("rows.thin.set", DECAY)),
        # What cannot be trained or reported.
        (GRID.replace("rank = 4 }}", "rnk = 4 }}", 1), {}, ("row thin", "--method.rnk 4")),
        (with_axes(BOTH.replace("0.0, 0.1", "-0.1, 0.0"), BOTH), {}, ("row dense", "-0.1")),
        (GRID.replace(SET_THIN, 'set.method = {{ name = "galore", rank = 4 }}\n'
         'set.optimizer = {{ name = "sgd" }}\n'), {}, ("row thin", "galore", "sgd")),
        (GRID, {"test_tokens = 160": ""}, ("row dense", "[evaluation] test_tokens")),
        (GRID, {EVALUATION: EVALUATION.replace("20", "99")}, ("row dense", "interval = 99")),
        (with_thin("set.training = {{ steps = 5 }}", 'differ_in = ["training"]'), {},
         ("row thin", "steps = 5")),
        (GRID, {'dtype = "float32"': 'dtype = "auto"'}, ("row dense", 'dtype = "auto"')),
    ],
)  # fmt: skip
def test_a_comparison_that_is_unfair_or_cannot_be_trained_is_refused_before_any_run(
    tmp_path, grid, changes, fragments
):
    with refused(*fragments, error=ConfigError):
        declare(tmp_path, grid, changes)


def test_the_checksum_of_a_configuration_ignores_names_folders_and_defaults_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    here, elsewhere = declare(tmp_path / "a"), declare(tmp_path / "b")

    def config_of(comparison, row, rate, seed):
        return plan_run(comparison, comparison.rows[row], {LR: rate}, seed).config

    config, same = (config_of(each, 1, 1e-2, 1) for each in (here, elsewhere))
    assert config != same
    assert config_sha256(config) == config_sha256(same)
    others = [config_of(here, *of) for of in ((1, 1e-2, 2), (1, 2e-2, 1), (2, 1e-2, 1))]
    assert len({config_sha256(other) for other in (config, *others)}) == 4

    class LaterMetrics(type(config.metrics)):
        added: int = 3

    def with_added(value):
        metrics = LaterMetrics(**config.metrics.model_dump(), added=value)
        return config_sha256(config.model_copy(update={"metrics": metrics}))

    # A later version with one more key has the same checksums.
    assert with_added(3) == config_sha256(config)
    assert with_added(4) != config_sha256(config)


BEST = {"dense": {LR: 2e-3, OTHER: 2e-3, DECAY: 0.1}, "thin": {LR: 2e-2, OTHER: 2e-3}}


def distance(run, best=BEST):
    """A loss that grows with the distance of each key to its best value."""
    best = best["dense" if run.row == "dense" else "thin"]
    loss = 2.0 + sum(abs(math.log(run.tuned[key] / best[key])) for key in (LR, OTHER))
    if run.row == "dense":
        loss += abs(run.tuned[DECAY] - best[DECAY])
    return loss, loss + 1


def values(runs, row):
    return [tuple(run.tuned.values()) for run in runs if run.row == row]


def test_rates_are_chosen_on_one_seed_and_reported_on_the_others(tmp_path):
    comparison = declare(tmp_path)
    state, (selection, report) = train(comparison, lambda run: (loss_of(run), 9.0))
    # Rows alternate.
    assert [run.row for run in selection] == ["dense", "thin"] * 3
    assert {run.seed for run in selection} == {1}
    rows = ("dense", "thin", "thin-balanced")
    assert [(run.seed, run.row) for run in report] == [(of, row) for of in (2, 3) for row in rows]
    assert set(values(report, "thin-balanced")) == {(2e-2,)}
    assert state.chosen == {"dense": {LR: 2e-3}, "thin": {LR: 2e-2}, "thin-balanced": {LR: 2e-2}}
    assert comparison.num_runs == len(state.finished) == 12


def test_each_key_is_tried_with_the_others_at_their_best_so_far(tmp_path):
    grid = with_axes(BOTH, TUNE_OTHER.replace("1e-3, 2e-3", "2e-3, 1e-3"))
    # Learning rates are another name for their axis.
    grid = grid.replace("learning_rates = [1e-3", f'tune."{LR}" = [1e-3')
    comparison = declare(tmp_path, grid)
    state, (of_lr, of_other, of_decay, report) = train(comparison, distance)
    # The others start at their middle value; of two values, that is the lower one.
    assert values(of_lr, "dense") == [(1e-3, 2e-3, 0.0), (2e-3, 2e-3, 0.0), (4e-3, 2e-3, 0.0)]
    assert values(of_lr, "thin") == [(1e-2, 2e-3), (2e-2, 2e-3), (4e-2, 2e-3)]
    # The run at the best value so far is known already.
    assert values(of_other, "dense") == [(2e-3, 1e-3, 0.0), (2e-3, 4e-3, 0.0)]
    assert values(of_other, "thin") == [(2e-2, 1e-3), (2e-2, 4e-3)]
    assert values(of_decay, "dense") == [(2e-3, 2e-3, 0.1)]
    assert values(of_decay, "thin") == []
    assert comparison.num_runs == len(state.finished) == 6 + 4 + 1 + 6
    # A row that uses the values of another one takes all of them.
    assert state.chosen == BEST | {"thin-balanced": BEST["thin"]}
    assert report[0].config.optimizer.weight_decay == 0.1
    assert report[0].folder.name == "lr-0.002-other_lr-0.002-weight_decay-0.1-seed-2"


def test_a_repeated_key_is_tried_again_with_the_others_at_their_best(tmp_path):
    def losses(run):
        if run.row != "dense":
            return distance(run)
        # The lower the other rate, the higher the best learning rate.
        rate, other = run.tuned[LR], run.tuned[OTHER]
        return abs(math.log(rate / (4e-6 / other))) + 2 * abs(math.log(other / 1e-3)), 9.0

    axes = AXES.replace("]", f', "{LR}"]')
    state, _ = train(declare(tmp_path, with_axes(BOTH, TUNE_OTHER, axes)), losses)
    assert state.chosen["dense"] == {LR: 4e-3, OTHER: 1e-3, DECAY: 0.0}
    assert [key for key, of_rows in state.tried if "dense" in of_rows] == [LR, OTHER, DECAY, LR]


def test_nothing_is_chosen_from_an_unfinished_axis_or_a_diverged_run(tmp_path):
    comparison = declare(tmp_path)
    first = follow(comparison, lambda run: None).due
    results = {run: result_of(run, loss_of(run), 9.0) for run in first[:-1]}
    state = follow(comparison, results.get)
    assert (state.due, state.chosen) == (first[-1:], {})

    def diverging(run):
        return (math.nan if run.tuned[LR] == 2e-3 else loss_of(run)), 9.0

    state, _ = train(comparison, diverging)
    assert state.tried[0][1]["dense"][2e-3] == math.inf
    assert state.chosen["dense"] == {LR: 1e-3}
