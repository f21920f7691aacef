"""Rows that give their values, and rows of different length: runs, report and pictures."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.declared_comparison import GRID, write_grid
from support.finished_runs import finish

from switchtitan.comparison import measure, plots
from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.measure import Measurements
from switchtitan.comparison.plan import Run, check_plan, plan_run
from switchtitan.comparison.plots import draw_against, write_pictures
from switchtitan.comparison.report import markdown, write_report
from switchtitan.comparison.table import is_at_edge, report_gaps, report_rows
from switchtitan.errors import ConfigError
from switchtitan.report.comparison_files import read_comparison
from switchtitan.report.comparison_report import comparison_report

OTHER = "optimizer.other_lr"
AXES = f'axes = ["optimizer.lr", "{OTHER}"]\n[[rows]]'
THIN = 'set.method = {{ name = "lora", rank = 4 }}\n'
# `thin` gives one of the keys and chooses the other; `dense` chooses both.
GRID_GIVEN = (
    GRID.replace("[[rows]]", AXES, 1)
    .replace("4e-3]\n", f'4e-3]\ntune."{OTHER}" = [1e-3, 2e-3, 4e-3]\n', 1)
    .replace(THIN, THIN + "set.optimizer = {{ other_lr = 5e-3 }}\n")
)
# Nothing is chosen, and `thin` takes half as many steps.
ALL_GIVEN = (
    GRID.replace("[[rows]]", 'differ_in = ["training"]\n[[rows]]', 1)
    .replace("learning_rates = [1e-3, 2e-3, 4e-3]", "set.optimizer = {{ lr = 2e-3 }}")
    .replace("learning_rates = [1e-2, 2e-2, 4e-2]", "set.optimizer = {{ lr = 2e-2 }}")
    .replace('learning_rate_of = "thin"', "set.optimizer = {{ lr = 2e-2 }}")
    .replace(THIN, THIN + "set.training = {{ steps = 20 }}\n")
)


def declare(folder: Path, grid: str) -> ComparisonConfig:
    comparison = load_comparison(write_grid(folder, grid))
    check_plan(comparison)
    return comparison


def finish_all(comparison: ComparisonConfig) -> None:
    while due := Comparison(comparison).state().due:
        for run in due:
            steps = run.config().training.steps
            loss = 2.0 + 0.1 * (run.row != "dense") + 0.001 * run.seed
            finish(run, loss, loss + 1, step=steps, tokens_seen=128 * steps)


def names(runs: list[Run]) -> set[str]:
    return {run.name for run in runs}


def test_a_given_key_of_a_row_that_chooses_others_changes_no_folder(tmp_path):
    comparison = declare(tmp_path, GRID_GIVEN)
    run = plan_run(comparison, comparison.row("thin"), {"optimizer.lr": 1e-2}, 1)
    assert run.folder.name == "lr-0.01-seed-1"
    assert run.config().optimizer.other_lr == 5e-3


def test_no_value_is_marked_as_chosen_while_values_are_being_chosen(tmp_path):
    comparison = declare(tmp_path, GRID_GIVEN)
    for run in Comparison(comparison).state().due[:4]:
        finish(run, 2.0, 3.0)
    state = Comparison(comparison).state()
    rows = report_rows(state, {})
    assert [row.values for row in rows] == [{}, {}, {}]
    assert "**" not in markdown(state, rows, [])
    finish_all(comparison)
    state = Comparison(comparison).state()
    thin = report_rows(state, {})[1]
    assert thin.values[OTHER] == 5e-3
    assert not is_at_edge(thin, OTHER)
    assert "**" in markdown(state, report_rows(state, {}), [])


def test_a_report_without_a_choice_says_so(tmp_path):
    comparison = declare(tmp_path, ALL_GIVEN)
    state = Comparison(comparison).state()
    assert names(list(state.due)) >= {"dense lr 0.002 seed 2", "thin lr 0.02 seed 3"}
    assert state.num_runs == 6
    finish_all(comparison)
    state = Comparison(comparison).state()
    text = markdown(state, report_rows(state, {}), report_gaps(state))
    assert "lr of each row: given. Losses are" in text
    assert "Choice of values" not in text
    assert "chosen" not in text


def test_some_given_rows_are_named(tmp_path):
    grid = GRID.replace("learning_rates = [1e-3, 2e-3, 4e-3]", "set.optimizer = {{ lr = 2e-3 }}")
    state = Comparison(declare(tmp_path, grid)).state()
    assert "with seed 1. Given for dense. Losses" in markdown(state, report_rows(state, {}), [])


def test_rows_of_different_length_have_their_tokens_in_tables(tmp_path):
    comparison = declare(tmp_path, ALL_GIVEN)
    finish_all(comparison)
    state = Comparison(comparison).state()
    rows, gaps = report_rows(state, {}), report_gaps(state)
    assert [(row.num_steps, row.num_tokens) for row in rows[:2]] == [(40, 5120), (20, 2560)]
    text = markdown(state, rows, gaps)
    assert "|  | lr | M tokens | test loss |" in text
    assert "0.00 to 0.01 M tokens per run" in text
    folder = tmp_path / "out" / "reports" / "grid"
    write_report(folder, state, rows, gaps)
    (section,) = [
        of for of in comparison_report(read_comparison(folder))["sections"] if of["id"] == "results"
    ]
    assert "M tokens" in [column["title"] for column in section["tables"][0]["columns"]]


def test_loss_against_time_counts_the_steps_of_each_row(tmp_path, monkeypatch):
    comparison = declare(tmp_path, ALL_GIVEN)
    finish_all(comparison)
    state = Comparison(comparison).state()
    measured = {
        name: Measurements(0.1, ratio, ratio, ratio, 1.0, "")
        for name, ratio in (("dense", 1.0), ("thin", 1.2), ("thin-balanced", 1.2))
    }
    drawn: dict[str, list[float]] = {}

    def draw(rows, place, title):
        drawn[title] = [place(row) for row in rows]
        return draw_against(rows, place, title)

    monkeypatch.setattr(plots, "draw_against", draw)
    monkeypatch.setattr(plots, "draw_curves", lambda state: Figure())
    write_pictures(tmp_path, state, report_rows(state, measured))
    assert drawn["step time x steps / dense's"] == pytest.approx([1.0, 0.6, 1.2])


def test_a_short_baseline_is_timed_in_as_many_rounds_as_it_has(tmp_path, monkeypatch):
    comparison = declare(tmp_path, ALL_GIVEN.replace("steps = 20", "steps = 200"))
    seen = []

    def time(configs, rounds, steps_per_round):
        seen.append(rounds)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "time_steps_side_by_side", time)
    # It changes its process, which here is that of the other tests.
    monkeypatch.setattr(measure.logging, "disable", lambda level: None)
    monkeypatch.setattr(measure.torch, "set_num_threads", lambda number: None)
    runs = [plan_run(comparison, comparison.row(name), {}, 1) for name in ("thin", "dense")]
    with pytest.raises(KeyboardInterrupt):
        measure._time_steps(*runs)
    longest = (40 - measure.WARM_UP_STEPS) // measure.STEPS_PER_ROUND
    assert seen == [longest]
    assert longest < measure.ROUNDS


def test_a_given_rate_in_quotes_is_read_as_on_the_command_line(tmp_path):
    comparison = declare(tmp_path, ALL_GIVEN.replace("lr = 2e-3", 'lr = "2e-3"'))
    run = plan_run(comparison, comparison.row("dense"), {}, 2)
    assert run.config().optimizer.lr == 2e-3
    assert (run.tuned, run.name, run.folder.name) == ((), "dense seed 2", "seed-2")


def test_a_given_rate_that_is_no_number_is_refused_with_the_row(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)in `set` of row dense:.*lr = true: expected a num"):
        declare(tmp_path, ALL_GIVEN.replace("lr = 2e-3", "lr = true"))
