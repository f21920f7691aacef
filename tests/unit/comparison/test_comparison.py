"""The stages of a comparison over runs whose results the tests write, its report and CSV file."""

import csv
import io
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.declared_comparison import GRID, write_grid
from support.finished_runs import finish, finish_due, state_of
from support.trained import save_run

from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import Run, check_plan, plan_run
from switchtitan.comparison.report import markdown, report_rows, write_report
from switchtitan.comparison.runs import config_sha256, read_csv, read_folder
from switchtitan.errors import ConfigError
from switchtitan.job.config import parse_arguments
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


def rates(runs, row):
    return [run.value(LR) for run in runs if run.row == row]


def finish_report(comparison, test_loss, diverged=()):
    """Chooses rates, and finishes the runs of the report with these losses."""
    finish_due(comparison, LOSS)
    for run in state_of(comparison).due:
        other = {"diverged": True} if (run.row, run.seed) in diverged else {}
        finish(run, 2.0, test_loss[run.row, run.seed], **other)
    state = state_of(comparison)
    assert state.due == ()
    return state, report_rows(state)


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
    assert state.num_runs == state.num_finished == 12
    assert state.due == ()


def test_only_a_run_with_all_its_steps_and_the_same_settings_counts(comparison):
    run = plan_run(comparison, comparison.row("thin"), {LR: 1e-2}, 1)
    assert read_folder(run) is None
    for step in (20, 80):
        finish(run, 1.0, step=step)
        assert read_folder(run) is None
    finish(run, math.nan)
    assert read_folder(run).diverged
    saved = run.folder / "config.toml"
    saved.write_text(saved.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    with pytest.raises(ConfigError, match=r"seed-1: this run has another configuration"):
        read_folder(run)


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
    rows = report_rows(state)
    figures = [(row.of_first("steps"), row.of_first("tokens")) for row in rows[:2]]
    assert figures == [(40, 5120), (20, 2560)]
    text = markdown(state)
    assert "given" in text
    assert "chosen" not in text
    assert "M tokens" in text


# ---- The report


def test_the_report_has_losses_and_differences(comparison, tmp_path):
    # Seeds shift all rows alike.
    state, rows = finish_report(comparison, losses((2.1, 2.2), (3.1, 3.2), (2.6, 2.7)))
    dense, thin, _ = rows
    assert dense.summary("test_loss").mean == pytest.approx(2.15)
    assert dense.summary("test_loss").std == pytest.approx(0.1 / 2**0.5)
    assert dense.difference is None
    assert thin.difference.mean == pytest.approx(1.0)
    assert thin.difference.std == pytest.approx(0.0, abs=1e-12)
    assert thin.tried[0].losses == pytest.approx({1e-2: 2.201, 2e-2: 2.101, 4e-2: 2.201})
    text = markdown(state)
    assert "| thin | 0.02 | 3.1500 ± 0.0707 |" in text
    assert "+1.0000 (+1.0000 to +1.0000)" in text
    assert text.count("differs |") == 2
    write_report(tmp_path / "report", state)
    assert (tmp_path / "report" / "report.md").read_text() == text
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_can_be_written_after_the_first_run(comparison, tmp_path):
    finish(state_of(comparison).due[0], 2.0, 3.0)
    state = state_of(comparison)
    assert [row.values for row in report_rows(state)] == [{}, {}, {}]
    write_report(tmp_path / "report", state)
    assert "1 of 12 runs are finished" in (tmp_path / "report" / "report.md").read_text()


def test_a_best_rate_at_the_edge_is_marked(comparison):
    while finish_due(comparison, distance_to(4e-3, 2e-2)):
        pass
    text = markdown(state_of(comparison))
    assert "| 0.004 (edge) |" in text
    assert text.count("(edge) |") == 1


def test_no_difference_is_shown_if_the_interval_holds_zero(comparison):
    # dense - thin is -0.1 with one seed and +0.1 with the other.
    state, _ = finish_report(comparison, losses((3.0, 3.2), (3.1, 3.1), (3.0, 3.0)))
    assert markdown(state).count("no difference shown |") == 2


def test_p_values_are_corrected_over_the_rows_of_the_table(comparison):
    # Seed by seed, both rows differ from dense by 0.10 and 0.11: |t| is 21, p is 0.03.
    state, rows = finish_report(comparison, losses((3.0, 3.1), (3.1, 3.21), (3.1, 3.21)))
    thin = rows[1]
    assert thin.difference.p == pytest.approx(2 / math.pi * math.atan(1 / 21), rel=1e-6)
    assert thin.adjusted_p == pytest.approx(2 * thin.difference.p)
    assert not thin.difference.holds_zero
    assert "no difference shown after Holm's correction" in markdown(state)


def test_a_diverged_run_of_the_choice_has_no_loss(comparison):
    for run in state_of(comparison).due:
        finish(run, 1.0, **({"diverged": True} if run.value(LR) in (2e-3, 4e-2) else {}))
    state = state_of(comparison)
    assert state.tuning.tried["dense"][0].losses[2e-3] == math.inf
    assert "0.002: diverged" in markdown(state)


def test_a_row_with_a_diverged_run_has_no_mean(comparison):
    given = losses((2.1, 2.2), (3.1, 3.2), (2.6, 2.7))
    state, rows = finish_report(comparison, given, diverged=[("thin-balanced", 3)])
    dense, _, balanced = rows
    assert dense.summary("validation_loss").mean == 2.0
    assert dense.summary("test_bits_per_byte").mean == 1.5
    means = [balanced.summary(figure).mean for figure in ("test_loss", "test_bits_per_byte")]
    assert [*means, balanced.difference.mean] == [math.inf] * 3
    assert balanced.adjusted_p is None
    assert "| thin-balanced | 0.02 | diverged |" in markdown(state)


# ---- Runs from CSV files


CONTINUED = GRID.replace("[[rows]]", 'finished_runs = ["runs.csv"]\n[[rows]]', 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The CSV file of a finished comparison in another folder."""
    folder = tmp_path_factory.mktemp("finished")
    comparison = load_comparison(write_grid(folder))
    while finish_due(comparison, LOSS):
        pass
    write_report(folder / "report", state_of(comparison))
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


def test_runs_in_a_file_are_finished_without_their_folders(csv_file, continued):
    folder = csv_file.parent / "out" / "reports" / "after"
    state = state_of(continued)
    assert state.due == ()
    write_report(folder, state)
    assert (folder / "runs.csv").read_text() == csv_file.read_text()
    # A report's own file counts too.
    csv_file.unlink()
    undeclared = load_comparison(write_grid(csv_file.parent))
    assert len(state_of(undeclared).due) == 6
    assert Comparison(undeclared, folder).state().due == ()


def test_a_report_never_drops_a_result_of_its_file(csv_file):
    folder = csv_file.parent / "report"
    folder.mkdir()
    csv_file.rename(folder / "runs.csv")
    before = read_csv([folder / "runs.csv"])
    wider = GRID.replace("4e-3]", "4e-3, 8e-3]").replace("4e-2]", "4e-2, 8e-2]")
    comparison = Comparison(load_comparison(write_grid(csv_file.parent, wider)), folder)
    state = comparison.state()
    assert [run.value(LR) for run in state.due] == [8e-3, 8e-2]
    write_report(folder, state)
    after = read_csv([folder / "runs.csv"])
    assert after == before
    assert len(after) == 12


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
    with pytest.raises(ConfigError, match=r"b.csv, line 2: an earlier line has another result"):
        state_of(both)


def test_only_missing_runs_are_trained(csv_file, continued):
    lines = csv_file.read_text().splitlines(keepends=True)
    csv_file.write_text("".join(line for line in lines if not line.startswith("report,thin,")))
    due = state_of(continued).due
    assert [(run.row, run.seed) for run in due] == [("thin", 2), ("thin", 3)]
    for run in due:
        finish(run, LOSS(run), LOSS(run) + 1)
    write_report(csv_file.parent / "after", state_of(continued))
    assert (csv_file.parent / "after" / "runs.csv").read_text() == "".join(lines)


def test_a_run_of_another_configuration_seed_or_corpus_is_not_used(csv_file, continued):
    change(csv_file, 0, seed="9")
    (run,) = state_of(continued).due
    assert (run.row, run.value(LR)) == ("dense", 2e-3)
    change(csv_file, 0, seed="1")
    assert Comparison(continued, csv_file.parent / "report", "f").state().due == ()
    with pytest.raises(ConfigError, match=r"^dense lr .* f, .* g"):
        Comparison(continued, csv_file.parent / "report", "g").state()
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
    assert next(iter(state.selection.values())).diverged
    assert state.tuning.chosen == {"dense": {LR: 1e-3}, "thin": {LR: 2e-2}}
    thin = report_rows(state)[1]
    assert (thin.of_first("peak_gib"), thin.summary("tokens_per_s")) == (None, None)


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        ({"validation_loss": "low"}, ("line 3", "validation_loss", "'low'")),
        ({"validation_loss": ""}, ("line 3", "finite losses")),
        ({"test_loss": "nan"}, ("line 3", "finite losses")),
        ({"seed": "-1"}, ("line 3", "seed", "'-1'")),
        ({"steps": ""}, ("line 3", "steps")),
        ({"config_sha256": "abc"}, ("line 3", "config_sha256", "'abc'")),
        (b"stage,row,seed\na,b,1\n", ("line 2", "config_sha256")),
        (b"\xff\xfe", ("expected the runs.csv",)),
        (None, ("expected the runs.csv", "No such file")),
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
        read_csv([csv_file])
    for fragment in ("runs.csv", *fragments):
        assert fragment in str(caught.value)


# ---- The effective rank of a run's change


def test_the_effective_rank_is_that_of_the_last_checkpoint(corpora, tmp_path):
    run = Path(shutil.copytree(save_run(corpora / "effective-rank", "lora"), tmp_path / "run"))
    words = ("--config", str(run / "config.toml"))
    config = parse_arguments(words, 1)
    of_run = Run("lora", (), 1, run, words)
    finish(of_run, 3.0, step=config.training.steps)
    spectra = checkpoint_spectra(run / "checkpoints" / "step-000000007").values()
    shares = [values.double() / values.double().sum() for values in spectra]
    ranks = [torch.special.entr(of).sum().exp().item() for of in shares]
    found = read_folder(of_run)
    # Spectra are in fp32.
    assert found.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    assert found.config_sha256 == config_sha256(config)
    shutil.rmtree(run / "checkpoints")
    assert read_folder(of_run).effective_rank is None
