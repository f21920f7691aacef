"""The stages of a comparison over runs whose results the tests write, its report and CSV file."""

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.declared_comparison import GRID, write_grid
from support.finished_runs import finish, finish_due
from support.trained import save_run

from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.effective_rank import EFFECTIVE_RANK_FILE, effective_rank
from switchtitan.comparison.plan import Run, check_plan, plan_run
from switchtitan.comparison.report import markdown, write_report
from switchtitan.comparison.results import RunResult, read_result
from switchtitan.comparison.runs_csv import read_finished_runs
from switchtitan.comparison.table import is_at_edge, report_gaps, report_rows
from switchtitan.errors import ConfigError
from switchtitan.spectra.weight_change import checkpoint_spectra

LR = "optimizer.lr"
HEIGHT = {"dense": 1.0, "thin": 2.0, "thin-balanced": 1.5}


@pytest.fixture
def comparison(tmp_path):
    return load_comparison(write_grid(tmp_path))


def distance_to(dense, thin):
    """A loss that increases with the distance to each row's best rate, slightly with the seed."""
    best = {"dense": dense, "thin": thin, "thin-balanced": thin}

    def loss(run):
        rate = run.value(LR)
        ratio = max(rate / best[run.row], best[run.row] / rate)
        return HEIGHT[run.row] + ratio / 10 + 0.001 * run.seed

    return loss


LOSS = distance_to(2e-3, 2e-2)


def state_of(comparison):
    return Comparison(comparison).state()


def rates(runs, row):
    return [run.value(LR) for run in runs if run.row == row]


def finish_report(comparison, test_loss, diverged=()):
    """Chooses rates, and finishes the runs of the report with these losses."""
    stages = Comparison(comparison)
    for run in stages.state().due:
        finish(run, LOSS(run))
    for run in stages.state().due:
        other = {"diverged": True} if (run.row, run.seed) in diverged else {}
        finish(run, 2.0, test_loss[run.row, run.seed], **other)
    state = stages.state()
    assert state.due == ()
    return state, report_rows(state, {}), report_gaps(state)


def losses(dense, thin, balanced):
    """Test losses by row and seed, from those of seeds 2 and 3."""
    rows = {"dense": dense, "thin": thin, "thin-balanced": balanced}
    return {(row, seed): of[seed - 2] for row, of in rows.items() for seed in (2, 3)}


# ---- The stages


def test_rates_are_chosen_on_one_seed_and_reported_on_the_others(comparison):
    runs = state_of(comparison).due
    # Middle rates first, and nothing is chosen before all are tried.
    assert [(run.row, run.value(LR)) for run in runs[:2]] == [("dense", 2e-3), ("thin", 2e-2)]
    assert {run.seed for run in runs} == {1}
    assert sorted(rates(runs, "thin")) == [1e-2, 2e-2, 4e-2]
    assert rates(runs, "thin-balanced") == []
    finish_due(comparison, LOSS)
    runs = finish_due(comparison, LOSS)
    assert [(run.seed, run.row) for run in runs] == [
        (seed, row) for seed in (2, 3) for row in HEIGHT
    ]
    assert set(rates(runs, "thin-balanced")) == {2e-2}
    state = state_of(comparison)
    assert state.tuning.chosen == {"dense": {LR: 2e-3}, "thin": {LR: 2e-2}}
    assert state.num_runs == len(state.selection) + len(state.report) == 12
    assert state.due == ()


def test_a_best_rate_at_the_edge_widens_the_grid_of_every_row(comparison):
    loss = distance_to(8e-3, 2e-2)
    finish_due(comparison, loss)
    widening = finish_due(comparison, loss)
    assert (rates(widening, "dense"), rates(widening, "thin")) == ([8e-3], [5e-3])
    # The grid is widened only once: the best rate is still the highest, which the report states.
    state = state_of(comparison)
    assert state.tuning.chosen == {"dense": {LR: 8e-3}, "thin": {LR: 2e-2}}
    rows = report_rows(state, {})
    assert [is_at_edge(row, LR) for row in rows] == [True, False, False]
    assert "0.008 (edge)" in markdown(state, rows, [])


def test_only_a_run_with_all_its_steps_and_the_same_settings_counts(comparison):
    run = plan_run(comparison, comparison.row("thin"), {LR: 1e-2}, 1)
    assert read_result(run) is None
    for step in (20, 80):
        finish(run, 1.0, step=step)
        assert read_result(run) is None
    finish(run, math.nan)
    assert read_result(run).validation_loss == math.inf
    saved = run.folder / "config.toml"
    saved.write_text(saved.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    with pytest.raises(ConfigError, match=r"\[lr_schedule\]"):
        read_result(run)


def test_rows_with_given_rates_are_only_reported(tmp_path):
    grid = GRID.replace("[[rows]]", 'differ_in = ["training"]\n[[rows]]', 1)
    for row, rate in (("[1e-3, 2e-3, 4e-3]", "2e-3"), ("[1e-2, 2e-2, 4e-2]", "2e-2")):
        grid = grid.replace(f"learning_rates = {row}", f"set.optimizer = {{{{ lr = {rate} }}}}")
    grid = grid.replace('learning_rate_of = "thin"', "set.optimizer = {{ lr = 2e-2 }}")
    thin = 'set.method = {{ name = "lora", rank = 4 }}\n'
    comparison = load_comparison(
        write_grid(tmp_path, grid.replace(thin, thin + "set.training = {{ steps = 20 }}\n"))
    )
    check_plan(comparison)
    for run in state_of(comparison).due:
        steps = run.config().training.steps
        finish(run, 2.0, 3.0, step=steps, tokens_seen=128 * steps)
    state = state_of(comparison)
    assert state.due == ()
    rows = report_rows(state, {})
    assert [(row.num_steps, row.num_tokens) for row in rows[:2]] == [(40, 5120), (20, 2560)]
    text = markdown(state, rows, report_gaps(state))
    assert "given" in text
    assert "chosen" not in text
    assert "M tokens" in text


# ---- The report


def test_the_report_has_losses_differences_and_shares(comparison, tmp_path):
    # Seeds shift all rows alike.
    state, rows, gaps = finish_report(comparison, losses((2.1, 2.2), (3.1, 3.2), (2.6, 2.7)))
    dense, thin, balanced = rows
    assert dense.loss.mean == pytest.approx(2.15)
    assert dense.loss.std == pytest.approx(0.1 / 2**0.5)
    assert dense.difference is dense.verdict is None
    assert thin.difference.mean == pytest.approx(1.0)
    assert thin.difference.std == pytest.approx(0.0, abs=1e-12)
    assert thin.tried[0].losses == pytest.approx({1e-2: 2.201, 2e-2: 2.101, 4e-2: 2.201})
    assert thin.peak_gib is None
    assert thin.verdict == balanced.verdict == "differs"
    assert gaps[0].share.mean == pytest.approx(0.5)
    text = markdown(state, rows, gaps)
    assert "| thin | 0.02 | 3.1500 ± 0.0707 |" in text
    assert "closes 50 % (50 to 50 %) of the difference of +1.0000 (+1.0000 to +1.0000)" in text
    write_report(tmp_path / "report", state, rows, gaps)
    assert json.loads((tmp_path / "report" / "results.json").read_text())["num_runs_finished"] == 12


def test_a_report_can_be_written_after_the_first_run(comparison, tmp_path):
    finish(state_of(comparison).due[0], 2.0, 3.0)
    state = state_of(comparison)
    rows = report_rows(state, {})
    assert [row.values for row in rows] == [{}, {}, {}]
    write_report(tmp_path / "report", state, rows, report_gaps(state))
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert written["num_runs_finished"] == 1
    assert "not yet known" in markdown(state, [], report_gaps(state))


def test_no_share_is_reported_of_a_gap_whose_interval_holds_zero(comparison):
    # dense - thin is -0.1 with one seed and +0.1 with the other.
    state, rows, gaps = finish_report(comparison, losses((3.0, 3.2), (3.1, 3.1), (3.0, 3.0)))
    assert gaps[0].gap.holds_zero
    assert gaps[0].share is None
    assert {row.verdict for row in rows[1:]} == {"no difference shown"}
    assert "share not reported" in markdown(state, rows, gaps)


def test_p_values_are_corrected_over_the_rows_of_the_table(comparison):
    # Seed by seed, both rows differ from dense by 0.10 and 0.11: |t| is 21, p is 0.03.
    _, rows, _ = finish_report(comparison, losses((3.0, 3.1), (3.1, 3.21), (3.1, 3.21)))
    thin = rows[1]
    assert thin.difference.p == pytest.approx(2 / math.pi * math.atan(1 / 21), rel=1e-6)
    assert thin.adjusted_p == pytest.approx(2 * thin.difference.p)
    assert not thin.difference.holds_zero
    assert thin.verdict.startswith("no difference shown after")


def test_a_diverged_run_of_the_choice_has_no_loss(comparison):
    for run in state_of(comparison).due:
        finish(run, 1.0, **({"diverged": True} if run.value(LR) in (2e-3, 4e-2) else {}))
    state = state_of(comparison)
    assert state.tuning.tried["dense"][0].losses[2e-3] == math.inf
    assert "0.002: diverged" in markdown(state, report_rows(state, {}), [])


def test_a_row_with_a_diverged_run_has_no_mean_and_no_share(comparison):
    given = losses((2.1, 2.2), (3.1, 3.2), (2.6, 2.7))
    state, rows, gaps = finish_report(comparison, given, diverged=[("thin-balanced", 3)])
    dense, _, balanced = rows
    assert (dense.validation_loss.mean, dense.test_bits_per_byte.mean) == (2.0, 1.5)
    assert balanced.num_diverged == 1
    figures = (balanced.loss, balanced.perplexity, balanced.validation_loss, balanced.difference)
    assert {summary.mean for summary in figures} == {math.inf}
    assert (balanced.verdict, balanced.adjusted_p) == (None, None)
    assert not gaps[0].gap.holds_zero
    assert gaps[0].share is None
    text = markdown(state, rows, gaps)
    assert "| thin-balanced | 0.02 | diverged |" in text
    assert "a run diverged; share not reported" in text


# ---- Runs from CSV files


CONTINUED = GRID.replace("[[rows]]", 'finished_runs = ["runs.csv"]\n[[rows]]', 1)


def report(comparison, folder):
    state = state_of(comparison)
    write_report(folder, state, report_rows(state, {}), report_gaps(state))
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The CSV file of a finished comparison in another folder."""
    folder = tmp_path_factory.mktemp("finished")
    comparison = load_comparison(write_grid(folder))
    while finish_due(comparison, LOSS):
        pass
    report(comparison, folder / "report")
    return folder / "report" / "runs.csv"


@pytest.fixture
def csv_file(finished, tmp_path):
    return Path(shutil.copy(finished, tmp_path / "runs.csv"))


@pytest.fixture
def continued(csv_file):
    return load_comparison(write_grid(csv_file.parent, CONTINUED))


def lines_of(file):
    return list(csv.DictReader(io.StringIO(file.read_text())))


def change(file, line, **columns):
    lines = lines_of(file)
    lines[line] |= columns
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_every_run_is_in_the_file_with_machine_code_and_corpus(csv_file):
    lines = lines_of(csv_file)
    assert len(lines) == len({line["config_sha256"] for line in lines}) == 12
    first = lines[0]
    expected = {"stage": "selection", "row": "dense", LR: "0.002", "seed": "1", "steps": "40"}
    expected |= {"diverged": "False", "tokens": "5120", "test_bits_per_byte": "1.5"}
    expected |= {"num_trainable": "7", "state_gib": "0.5", "device": "CPU", "torch": "2"}
    expected |= {"commit": "abc", "corpus": "c", "corpus_fingerprint": "f", "effective_rank": ""}
    assert {key: first[key] for key in expected} == expected
    assert float(first["validation_loss"]) == pytest.approx(1.101)
    assert float(first["test_loss"]) == pytest.approx(2.101)


def test_runs_in_the_file_are_finished_without_their_folders(csv_file, continued):
    folder = csv_file.parent / "out" / "reports" / "after"
    state = report(continued, folder)
    assert state.due == ()
    assert all(not result.has_folder for result in [*state.selection, *state.report])
    assert (folder / "runs.csv").read_text() == csv_file.read_text()
    assert f"12 of these runs are from {csv_file}" in (folder / "report.md").read_text()


def test_runs_can_be_in_several_files(csv_file):
    """Both have some in common, and neither has all."""
    lines = csv_file.read_text().splitlines(keepends=True)
    parts = [csv_file.with_name(name) for name in ("a.csv", "b.csv")]
    parts[0].write_text("".join(lines[:8]))
    parts[1].write_text("".join([lines[0], *lines[6:]]))
    grid = CONTINUED.replace('"runs.csv"', '"a.csv", "b.csv"')
    both = load_comparison(write_grid(csv_file.parent, grid))
    assert state_of(both).due == ()
    change(parts[1], 0, test_loss="1.0")
    with pytest.raises(ConfigError, match=r"b.csv', line 2: .* \(.*a.csv', line 7\).* test_loss"):
        Comparison(both)


def test_only_missing_runs_are_trained(csv_file, continued):
    lines = csv_file.read_text().splitlines(keepends=True)
    csv_file.write_text("".join(line for line in lines if not line.startswith("report,thin,")))
    due = state_of(continued).due
    assert [(run.row, run.seed) for run in due] == [("thin", 2), ("thin", 3)]
    for run in due:
        finish(run, LOSS(run), LOSS(run) + 1)
    state = report(continued, csv_file.parent / "after")
    assert state.due == ()
    assert sum(result.has_folder for result in state.report) == 2
    assert (csv_file.parent / "after" / "runs.csv").read_text() == "".join(lines)


def test_a_run_of_another_configuration_seed_or_corpus_is_not_used(csv_file, continued):
    change(csv_file, 0, seed="9")
    (run,) = state_of(continued).due
    assert (run.row, run.value(LR)) == ("dense", 2e-3)
    change(csv_file, 0, seed="1")
    assert Comparison(continued, "f").state().due == ()
    with pytest.raises(ConfigError, match=r"runs.csv: dense lr .* f, .* g"):
        Comparison(continued, "g").state()
    base = csv_file.parent / "base.toml"
    base.write_text(base.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    assert len(state_of(continued).due) == 6


def test_a_run_that_diverged_stays_diverged_and_figures_of_a_gpu_may_be_missing(
    csv_file, continued
):
    for number, line in enumerate(lines_of(csv_file)):
        change(csv_file, number, device="H100", peak_gib="", tokens_per_s="")
        if line[LR] == "0.002" and line["seed"] == "1":
            lost = {"validation_loss": "inf", "test_loss": "inf", "tokens": ""}
            change(csv_file, number, diverged="True", **lost)
        if line[LR] == "0.004":
            change(csv_file, number, validation_loss="2.5")
    while finish_due(continued, LOSS):
        pass
    state = state_of(continued)
    assert state.selection[0].has_diverged
    assert state.tuning.chosen == {"dense": {LR: 1e-3}, "thin": {LR: 2e-2}}
    thin = report_rows(state, {})[1]
    assert (thin.peak_gib, thin.tokens_per_s) == (None, None)


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        ({"validation_loss": "low"}, ("line 3", "validation_loss = 'low'")),
        ({"validation_loss": ""}, ("line 3", "validation_loss", "finite")),
        ({"test_loss": "nan"}, ("line 3", "test_loss", "finite")),
        ({"seed": "-1"}, ("line 3", "seed = '-1'")),
        ({"steps": ""}, ("line 3", "steps = ''")),
        ({"tokens": ""}, ("line 3", "tokens = ''")),
        ({"diverged": "perhaps"}, ("line 3", "diverged = 'perhaps'")),
        ({"config_sha256": "abc"}, ("line 3", "config_sha256 = 'abc'")),
        ({"corpus_fingerprint": ""}, ("line 3", "corpus_fingerprint = ''")),
        (b"", ("no column seed, diverged, config_sha256",)),
        (b"stage,row,learning_rate,seed\n", ("no column diverged, config_sha256",)),
        (b"\xff\xfe", ("cannot be read",)),
        (None, ("cannot be read", "No such file")),
    ],
)
def test_a_file_or_a_line_that_is_no_run_is_refused(csv_file, columns, fragments):
    if isinstance(columns, dict):
        change(csv_file, 1, **columns)
    elif columns is None:
        csv_file.unlink()
    else:
        csv_file.write_bytes(columns)
    with pytest.raises(ConfigError) as caught:
        read_finished_runs(csv_file)
    for fragment in ("finished_runs", "runs.csv", *fragments):
        assert fragment in str(caught.value)


def test_the_same_result_may_stand_twice_and_another_one_of_the_run_may_not(csv_file):
    lines = csv_file.read_text().splitlines(keepends=True)
    csv_file.write_text("".join([*lines, lines[1]]))
    assert len(read_finished_runs(csv_file)) == 12
    change(csv_file, 12, test_loss="1.0")
    with pytest.raises(ConfigError, match=r"line 14: .*line 2.* test_loss"):
        read_finished_runs(csv_file)


# ---- The effective rank of a run's change


@pytest.fixture(scope="module")
def trained(corpora):
    return save_run(corpora / "effective-rank", "lora")


def test_the_effective_rank_is_that_of_the_last_checkpoint_and_survives_it(trained, tmp_path):
    own = Path(shutil.copytree(trained, tmp_path / "run"))
    result = RunResult(Run("lora", (), 1, own, ()), 3.0, 3.0, {"step": 7}, "digest")
    spectra = checkpoint_spectra(own / "checkpoints" / "step-000000007").values()
    shares = [values.double() / values.double().sum() for values in spectra]
    ranks = [torch.special.entr(of).sum().exp().item() for of in shares]
    computed = effective_rank(result)
    # Spectra are in fp32.
    assert computed == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    shutil.rmtree(own / "checkpoints")
    assert effective_rank(result) == computed
    assert effective_rank(replace(result, test_loss=math.inf)) is None
    elsewhere = replace(result, has_folder=False, figures={"effective_rank": 5.5})
    assert effective_rank(elsewhere) == 5.5
    # What is kept of another step, or damaged, is not used.
    for contents in (json.dumps({"step": 6, "effective_rank": computed}), "", "[]"):
        (own / EFFECTIVE_RANK_FILE).write_text(contents)
        assert effective_rank(result) is None
