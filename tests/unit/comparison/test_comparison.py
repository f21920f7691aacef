"""The stages of a comparison, over runs whose results the tests write."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.declared_comparison import GRID, write_grid
from support.finished_runs import finish, finish_due

from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.plan import Run, check_plan, plan_run
from switchtitan.comparison.report import markdown, write_report
from switchtitan.comparison.results import read_result
from switchtitan.comparison.runs_csv import run_record, runs_csv
from switchtitan.comparison.table import is_at_edge, report_gaps, report_rows
from switchtitan.errors import ConfigError


@pytest.fixture
def comparison(tmp_path: Path) -> ComparisonConfig:
    return declare(tmp_path)


def declare(
    folder: Path, changes: dict[str, str] | None = None, grid: str = GRID
) -> ComparisonConfig:
    return load_comparison(write_grid(folder, grid, changes))


def distance_to(dense: float, thin: float) -> Callable[[Run], float]:
    """A loss that increases with the distance to each row's best rate, and slightly with the
    seed."""
    best = {"dense": dense, "thin": thin, "thin-balanced": thin}
    height = {"dense": 1.0, "thin": 2.0, "thin-balanced": 1.5}

    def loss(run: Run) -> float:
        ratio = max(
            run.value("optimizer.lr") / best[run.row], best[run.row] / run.value("optimizer.lr")
        )
        return height[run.row] + ratio / 10 + 0.001 * run.seed

    return loss


def chosen_rates(**rates: float) -> dict[str, dict[str, float]]:
    return {row: {"optimizer.lr": rate} for row, rate in rates.items()}


def rates(runs: Iterable[Run], row: str) -> list[float]:
    return [run.value("optimizer.lr") for run in runs if run.row == row]


def test_middle_rates_are_tried_first_and_no_rate_is_chosen_before_all_are_tried(comparison):
    runs = Comparison(comparison).state().due
    assert [(run.row, run.value("optimizer.lr")) for run in runs[:2]] == [
        ("dense", 2e-3),
        ("thin", 2e-2),
    ]
    assert {run.seed for run in runs} == {1}
    assert sorted(rates(runs, "thin")) == [1e-2, 2e-2, 4e-2]
    assert rates(runs, "thin-balanced") == []
    for run in runs[:-1]:
        finish(run, 1.0)
    assert Comparison(comparison).state().due == runs[-1:]
    assert Comparison(comparison).state().tuning.chosen == {}


def test_bracketed_rates_are_reported_on_the_other_seeds(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    runs = finish_due(comparison, distance_to(2e-3, 2e-2))
    assert [(run.seed, run.row) for run in runs] == [
        (seed, row) for seed in (2, 3) for row in ("dense", "thin", "thin-balanced")
    ]
    assert set(rates(runs, "thin-balanced")) == {2e-2}
    state = Comparison(comparison).state()
    assert state.tuning.chosen == chosen_rates(dense=2e-3, thin=2e-2)
    assert state.num_runs == len(state.selection) + len(state.report) == 12
    assert Comparison(comparison).state().due == ()


def test_a_best_rate_at_the_edge_widens_the_grid_of_every_row(comparison):
    loss = distance_to(8e-3, 2e-2)
    finish_due(comparison, loss)
    widening = finish_due(comparison, loss)
    assert rates(widening, "dense") == [8e-3]
    # The best rate is in the middle, and both ends have the same loss: the lower end is widened.
    assert rates(widening, "thin") == [5e-3]
    state = Comparison(comparison).state()
    # The grid is widened only once: the best rate is still the highest, which the report states.
    assert state.tuning.chosen == chosen_rates(dense=8e-3, thin=2e-2)
    rows = {row.name: row for row in report_rows(state, {})}
    assert is_at_edge(rows["dense"], "optimizer.lr")
    assert not is_at_edge(rows["thin"], "optimizer.lr")
    assert not is_at_edge(rows["thin-balanced"], "optimizer.lr")
    assert "0.008 (edge)" in markdown(state, list(rows.values()), [])


def test_the_report_has_losses_differences_and_shares(comparison, tmp_path):
    loss = distance_to(2e-3, 2e-2)
    finish_due(comparison, loss)
    finish_due(comparison, loss)
    state = Comparison(comparison).state()
    rows, gaps = report_rows(state, {}), report_gaps(state)
    by_name = {row.name: row for row in rows}
    # Test losses are 1 more than validation losses: 2.1 for the dense row, plus 0.001 x seed.
    assert by_name["dense"].loss.mean == pytest.approx(2.1 + 0.0025)
    assert by_name["dense"].loss.std == pytest.approx(0.001 / 2**0.5)
    assert by_name["dense"].difference is None
    # Seeds shift all rows alike, so the differences are constant.
    assert by_name["thin"].difference.mean == pytest.approx(1.0)
    assert by_name["thin"].difference.std == pytest.approx(0.0, abs=1e-12)
    assert by_name["thin"].tried[0].losses == pytest.approx({1e-2: 2.201, 2e-2: 2.101, 4e-2: 2.201})
    assert by_name["thin"].peak_gib is None
    assert gaps[0].share.mean == pytest.approx(0.5)
    text = markdown(state, rows, gaps)
    assert "| thin | 0.02 | 3.1025 ± 0.0007 |" in text
    assert (
        "thin-balanced, from thin to dense: closes 50 % (50 to 50 %) of the difference of "
        "+1.0000 (+1.0000 to +1.0000)." in text
    )
    assert by_name["thin"].verdict == by_name["thin-balanced"].verdict == "differs"
    assert by_name["dense"].verdict is None
    assert "commit abc" in text
    written = tmp_path / "report"
    write_report(written, state, rows, gaps)
    assert json.loads((written / "results.json").read_text())["num_runs_finished"] == 12
    assert len((written / "runs.csv").read_text().splitlines()) == 13


def test_a_report_can_be_written_after_the_first_run(comparison, tmp_path):
    run, *_ = Comparison(comparison).state().due
    finish(run, 2.0, 3.0)
    state = Comparison(comparison).state()
    write_report(tmp_path / "report", state, report_rows(state, {}), report_gaps(state))
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert written["num_runs_finished"] == 1
    tried = {row["name"]: row["tried"] for row in written["rows"]}
    assert [(of["losses"], of["is_interior"]) for of in tried["thin"]] == [({}, None)]


def test_no_share_is_reported_of_a_gap_whose_interval_holds_zero(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    for run, loss in zip(
        Comparison(comparison).state().due, (3.0, 3.1, 3.0, 3.2, 3.1, 3.0), strict=True
    ):
        finish(run, 1.0, loss)
    state = Comparison(comparison).state()
    rows, gaps = report_rows(state, {}), report_gaps(state)
    # dense - thin is -0.1 with one seed and +0.1 with the other.
    assert gaps[0].gap.holds_zero
    assert gaps[0].share is None
    assert {row.verdict for row in rows if row.name != "dense"} == {"no difference shown"}
    text = markdown(state, rows, gaps)
    assert "holds zero; share not reported" in text
    assert "tie" not in text


def test_p_values_are_corrected_over_the_rows_of_the_table(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    # Seed by seed, both rows differ from dense by 0.10 and 0.11: |t| is 21, p is 0.03.
    losses = {("dense", 2): 3.0, ("dense", 3): 3.1}
    losses |= {(row, 2): 3.1 for row in ("thin", "thin-balanced")}
    losses |= {(row, 3): 3.21 for row in ("thin", "thin-balanced")}
    for run in Comparison(comparison).state().due:
        finish(run, 1.0, losses[run.row, run.seed])
    thin = report_rows(Comparison(comparison).state(), {})[1]
    assert thin.difference.p == pytest.approx(2 / math.pi * math.atan(1 / 21), rel=1e-6)
    assert thin.adjusted_p == pytest.approx(2 * thin.difference.p)
    assert not thin.difference.holds_zero
    assert thin.verdict == "no difference shown after Holm's correction"


def test_the_share_of_a_row_without_runs_is_not_yet_known(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    for run in Comparison(comparison).state().due:
        if run.row != "thin-balanced":
            finish(run, 1.0, {"dense": 2.0, "thin": 3.0}[run.row] + 0.1 * run.seed)
    state = Comparison(comparison).state()
    assert "thin-balanced, from thin to dense: not yet known." in markdown(
        state, [], report_gaps(state)
    )


def test_no_share_is_reported_of_a_row_with_a_diverged_run(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    for run in Comparison(comparison).state().due:
        loss = {"dense": 2.0, "thin": 3.0, "thin-balanced": 2.5}[run.row] + 0.1 * run.seed
        has_diverged = (run.row, run.seed) == ("thin-balanced", 3)
        finish(run, 1.0, loss, **({"diverged": True} if has_diverged else {}))
    state = Comparison(comparison).state()
    assert state.due == ()
    gaps = report_gaps(state)
    assert (gaps[0].gap.holds_zero, gaps[0].share) == (False, None)
    assert "thin-balanced, from thin to dense: a run diverged; share not reported." in markdown(
        state, report_rows(state, {}), gaps
    )


def test_a_diverged_run_is_never_chosen_and_is_in_the_report(comparison):
    for run in Comparison(comparison).state().due:
        finish(
            run, 1.0, **({"diverged": True} if run.value("optimizer.lr") in (2e-3, 4e-2) else {})
        )
    state = Comparison(comparison).state()
    assert state.tuning.tried["dense"][0].losses[2e-3] == float("inf")
    assert "0.002: diverged" in markdown(state, report_rows(state, {}), [])
    records = [run_record("selection", result, ["optimizer.lr"]) for result in state.selection]
    assert "selection,thin,0.04,1,True" in runs_csv(records, ["optimizer.lr"])


def test_only_a_run_with_all_its_steps_counts(comparison):
    run = plan_run(comparison, comparison.row("thin"), {"optimizer.lr": 1e-2}, 1)
    assert read_result(run) is None
    finish(run, 1.0, step=20)
    assert read_result(run) is None
    finish(run, 1.0, step=80)
    assert read_result(run) is None
    finish(run, float("nan"))
    assert read_result(run).validation_loss == float("inf")


def test_a_run_with_other_settings_is_refused(comparison):
    run = plan_run(comparison, comparison.row("thin"), {"optimizer.lr": 1e-2}, 1)
    finish(run, 1.0)
    saved = run.folder / "config.toml"
    saved.write_text(saved.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    with pytest.raises(ConfigError, match=r"this run has another \[lr_schedule\]"):
        read_result(run)


EVALUATION = "[evaluation]\ntest_tokens = 160\ninterval = 20"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_tokens = 160": ""}, r"\[evaluation\] test_tokens is not set"),
        ({EVALUATION: EVALUATION.replace("20", "99")}, "interval = 99"),
        ({"tensorboard = true": "tensorboard = false"}, r"\[metrics\] tensorboard = false"),
        ({"steps = 40": "steps = 7"}, "steps = 7: expected at least 8"),
        ({'dtype = "float32"': 'dtype = "auto"'}, r"\[training\] dtype = .*depend on the machine"),
        (
            {
                "global_batch_size = 8": "global_batch_size = 3",
                "local_batch_size = 2": "local_batch_size = 3",
            },
            "global_batch_size = 3",
        ),
    ],
)
def test_a_plan_whose_report_would_fail_is_refused_before_any_run(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_plan(declare(tmp_path, changes))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("set.model = {{ hidden_size = 24 }}", r"row thin: \[model\] differs from dense's"),
        ("set.training = {{ max_grad_norm = 0.5 }}", r"row thin: \[training\] differs"),
        ("set.job = {{ seed = 3 }}", r"row thin: set\.job\.seed has no effect"),
    ],
)
def test_rows_that_differ_in_more_than_their_methods_are_refused(tmp_path, keys, message):
    row = 'set.method = {{ name = "lora", rank = 4 }}\n'
    comparison = declare(tmp_path, grid=GRID.replace(row, row + keys + "\n"))
    with pytest.raises(ConfigError, match=message):
        check_plan(comparison)


def test_a_row_whose_optimizer_cannot_be_compiled_can_say_so(tmp_path):
    compiled = {"[compile]": "[compile]\noptimizer = true"}
    grid = GRID.replace("set.method", 'set.optimizer = {{ name = "scale" }}\nset.method', 1)
    with pytest.raises(ConfigError, match=r"\[compile\] optimizer = true"):
        check_plan(declare(tmp_path, compiled, grid))
    grid = grid.replace("set.method", "set.compile = {{ optimizer = false }}\nset.method", 1)
    check_plan(declare(tmp_path, compiled, grid))


def test_bytes_are_counted_in_as_few_micro_batches_as_fit(tmp_path):
    comparison = declare(
        tmp_path,
        {
            "global_batch_size = 8": "global_batch_size = 12",
            "local_batch_size = 2": "local_batch_size = 12",
        },
    )
    run = plan_run(comparison, comparison.row("thin"), {"optimizer.lr": 1e-2}, 1)
    assert [run.config_on(num_ranks).training.local_batch_size for num_ranks in (1, 2, 3, 4)] == [
        12,
        6,
        4,
        3,
    ]
    with pytest.raises(
        ConfigError, match=r"communication_ranks = 5: \[training\] global_batch_size = 12"
    ):
        run.config_on(5)


def test_a_wrong_key_of_a_row_is_reported_with_the_row(tmp_path):
    grid = GRID.replace("rank = 4 }}", "rnk = 4 }}", 1)
    with pytest.raises(
        ConfigError, match=r"(?s)in `set` of row thin:.*\[method\] rnk = 4: unknown key"
    ) as error:
        check_plan(declare(tmp_path, grid=grid))
    assert "command line" not in str(error.value)


def test_a_row_with_a_diverged_run_has_no_mean(comparison):
    finish_due(comparison, distance_to(2e-3, 2e-2))
    for run in Comparison(comparison).state().due:
        has_diverged = (run.row, run.seed) == ("thin", 3)
        finish(run, 2.0, 3.0, **({"diverged": True} if has_diverged else {}))
    dense, thin, _ = report_rows(Comparison(comparison).state(), {})
    assert (dense.validation_loss.mean, dense.test_bits_per_byte.mean) == (2.0, 1.5)
    assert thin.num_diverged == 1
    of_thin = (thin.loss, thin.perplexity, thin.validation_loss, thin.test_bits_per_byte)
    assert {summary.mean for summary in (*of_thin, thin.difference)} == {math.inf}
    assert (thin.verdict, thin.adjusted_p) == (None, None)
    state = Comparison(comparison).state()
    text = markdown(state, [dense, thin], report_gaps(state))
    assert "| thin | 0.02 | diverged |" in text
    assert "thin-balanced, from thin to dense: a run diverged; share not reported." in text
