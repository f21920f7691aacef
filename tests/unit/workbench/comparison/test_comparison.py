"""Results of runs in their folders and in CSV files, and the report on them."""

import csv
import math
import shutil
from pathlib import Path

import pytest
from support.checkpoints import refused
from support.comparisons import GRID, LR, finish, finish_all, loss_of, result_of, train, write_grid

from switchtitan.errors import ConfigError
from switchtitan.workbench.comparison.comparison import Comparison, follow
from switchtitan.workbench.comparison.config import load_comparison
from switchtitan.workbench.comparison.report import table, write_report
from switchtitan.workbench.comparison.runs import plan_run, read_csv, read_folder


@pytest.fixture
def comparison(tmp_path):
    return load_comparison(write_grid(tmp_path))


def reported(comparison, dense, thin, balanced):
    """The state of a finished comparison with these test losses on seeds 2 and 3."""
    losses = {"dense": dense, "thin": thin, "thin-balanced": balanced}
    return train(comparison, lambda run: (loss_of(run), losses[run.row][run.seed - 2]))[0]


def cells(state, column):
    return [line[column] for line in table(state)]


def test_the_report_has_losses_and_differences(comparison, tmp_path):
    # Seeds shift all rows alike.
    state = reported(comparison, (2.1, 2.2), (3.1, 3.2), (2.6, 2.7))
    assert cells(state, "test loss")[:2] == ["2.1500 ± 0.0707", "3.1500 ± 0.0707"]
    assert cells(state, "loss - dense's")[:2] == ["-", "+1.0000 (+1.0000 to +1.0000)"]
    assert cells(state, "verdict") == ["-", "differs", "differs"]
    write_report(tmp_path / "report", state)
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(cell in text for line in table(state) for cell in line.values())


def test_a_report_can_be_written_after_the_first_run(comparison, tmp_path):
    run = follow(comparison, lambda run: None).due[0]
    state = follow(comparison, {run: result_of(run, 2.0, 3.0)}.get)
    assert cells(state, "lr") == ["-", "-", "-"]
    write_report(tmp_path / "report", state)
    assert len(read_csv(tmp_path / "report" / "runs.csv")) == 1


def test_a_best_rate_at_the_edge_is_marked(comparison):
    state, _ = train(comparison, lambda run: (loss_of(run, dense=4e-3), 9.0))
    assert cells(state, "lr") == ["0.004 (edge)", "0.02", "0.02"]


def test_no_difference_is_shown_if_the_interval_holds_zero(comparison):
    # dense - thin is -0.1 with one seed and +0.1 with the other.
    state = reported(comparison, (3.0, 3.2), (3.1, 3.1), (3.0, 3.0))
    assert cells(state, "verdict") == ["-", "no difference shown", "no difference shown"]


def test_p_values_are_corrected_over_the_rows_of_the_table(comparison):
    # Seed by seed, both rows differ from dense by 0.10 and 0.11: |t| is 21.
    state = reported(comparison, (3.0, 3.1), (3.1, 3.21), (3.1, 3.21))
    p = 2 / math.pi * math.atan(1 / 21)
    assert p < 0.05 < 2 * p
    assert cells(state, "p") == ["-", f"{2 * p:.2g}", f"{2 * p:.2g}"]
    assert cells(state, "verdict")[1] == "no difference shown after Holm's correction"


def test_a_row_with_a_diverged_run_has_no_mean(comparison):
    state = reported(comparison, (2.1, 2.2), (3.1, 3.2), (2.6, math.inf))
    for column in ("test loss", "test bits/byte", "validation loss"):
        assert cells(state, column)[2] == "diverged"
        assert "±" in cells(state, column)[1]
    assert [cells(state, column)[2] for column in ("loss - dense's", "p", "verdict")] == ["-"] * 3


def test_only_a_run_with_all_its_steps_and_the_same_settings_counts(comparison):
    run = plan_run(comparison, comparison.rows[1], {LR: 1e-2}, 1)
    assert read_folder(run) is None
    for step in (20, 80):
        finish(run, 1.0, step=step)
        assert read_folder(run) is None
    finish(run, 1.0)
    assert not read_folder(run).diverged
    finish(run, math.nan)
    assert read_folder(run).diverged
    finish(run, 1.0, step=20, diverged=True)
    assert read_folder(run).test_loss == math.inf
    saved = run.folder / "config.toml"
    saved.write_text(saved.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    with pytest.raises(ConfigError, match=r"seed-1: this run has another configuration"):
        read_folder(run)


CONTINUED = GRID.replace("[[rows]]", 'finished_runs = ["runs.csv"]\n[[rows]]', 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The CSV file of a finished comparison in another folder."""
    folder = tmp_path_factory.mktemp("finished")
    comparison = Comparison(load_comparison(write_grid(folder)), folder)
    write_report(folder / "report", finish_all(comparison))
    return folder / "report" / "runs.csv"


@pytest.fixture
def csv_file(finished, tmp_path):
    return Path(shutil.copy(finished, tmp_path / "runs.csv"))


def continued(csv_file, grid=CONTINUED):
    """The comparison that has the file, and no folders of runs."""
    config = load_comparison(write_grid(csv_file.parent, grid))
    return Comparison(config, csv_file.parent / "report")


def test_every_run_is_in_the_file_with_machine_code_and_corpus(csv_file):
    with csv_file.open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len({line["config_sha256"] for line in lines}) == 12
    expected = {"row": "dense", LR: "0.001", "seed": "1", "diverged": "False", "device": "CPU"}
    expected |= {"torch": "2", "commit": "abc", "corpus_fingerprint": "f", "effective_rank": ""}
    assert {key: lines[0][key] for key in expected} == expected


def test_a_report_keeps_the_results_of_values_that_are_no_longer_due(csv_file):
    folder = csv_file.parent / "report"
    folder.mkdir()
    csv_file.rename(folder / "runs.csv")
    before = read_csv(folder / "runs.csv")
    wider = GRID.replace("4e-3]", "4e-3, 8e-3]").replace("4e-2]", "4e-2, 8e-2]")
    state = continued(csv_file, wider).state()
    assert [run.tuned[LR] for run in state.due] == [8e-3, 8e-2]
    write_report(folder, state)
    assert read_csv(folder / "runs.csv") == before
    assert len(before) == 12


def test_only_runs_that_no_file_has_are_trained(csv_file):
    lines = csv_file.read_text().splitlines(keepends=True)
    parts = [csv_file.with_name(name) for name in ("a.csv", "b.csv")]
    parts[0].write_text("".join(lines[:8]))
    parts[1].write_text("".join([lines[0], *lines[6:-1]]))
    comparison = continued(csv_file, CONTINUED.replace('"runs.csv"', '"a.csv", "b.csv"'))
    assert [(run.row, run.seed) for run in comparison.state().due] == [("thin-balanced", 3)]
    write_report(csv_file.parent / "report", finish_all(comparison))
    assert (csv_file.parent / "report" / "runs.csv").read_text() == "".join(lines)
    # A report's own file counts too.
    assert continued(csv_file, GRID).state().due == []


def test_a_run_of_another_configuration_or_corpus_is_not_used(csv_file):
    config = continued(csv_file).config
    assert Comparison(config, csv_file.parent / "report", "f").state().due == []
    with pytest.raises(ConfigError, match=r"dense.*lr-.* f, .* g"):
        Comparison(config, csv_file.parent / "report", "g").state()
    grid = CONTINUED.replace("rank = 4", "rank = 3")
    assert {run.row for run in continued(csv_file, grid).state().due} == {"thin"}


@pytest.mark.parametrize(
    ("contents", "fragments"),
    [
        (b"seed,loss/validation\n1,low\n", ("line 2", "'low'", "loss/test", "required")),
        (b"\xff\xfe", ("expected the runs.csv",)),
        (None, ("expected the runs.csv", "No such file")),
    ],
)
def test_a_file_or_a_line_that_is_no_run_is_refused(tmp_path, contents, fragments):
    if contents is not None:
        (tmp_path / "runs.csv").write_bytes(contents)
    with refused("runs.csv", *fragments, error=ConfigError):
        read_csv(tmp_path / "runs.csv")
