"""A comparison continues from the CSV file of its runs, without their folders."""

import csv
import io
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.declared_comparison import GRID, write_grid
from support.finished_runs import finish, finish_due

from switchtitan.comparison.comparison import Comparison, ComparisonState
from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.plan import Run
from switchtitan.comparison.plots import write_pictures
from switchtitan.comparison.report import write_report
from switchtitan.comparison.runs_csv import read_finished_runs
from switchtitan.comparison.table import report_gaps, report_rows
from switchtitan.errors import ConfigError
from switchtitan.report.comparison_files import read_comparison

CONTINUED = GRID.replace("[[rows]]", 'finished_runs = ["runs.csv"]\n[[rows]]', 1)


def loss(run: Run) -> float:
    best = 2e-3 if run.row == "dense" else 2e-2
    rate = run.value("optimizer.lr")
    assert rate is not None
    return 2.0 + max(rate / best, best / rate) / 10 + 0.01 * run.seed + 0.1 * (run.row != "dense")


def report(comparison: ComparisonConfig, folder: Path) -> ComparisonState:
    state = Comparison(comparison).state()
    write_report(folder, state, report_rows(state, {}), report_gaps(state))
    return state


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    """The runs of a finished comparison, whose folders are gone, next to one that names it."""
    comparison = load_comparison(write_grid(tmp_path))
    while finish_due(comparison, loss):
        pass
    report(comparison, tmp_path / "before")
    shutil.rmtree(tmp_path / "out" / "runs")
    return Path(shutil.copy(tmp_path / "before" / "runs.csv", tmp_path / "runs.csv"))


@pytest.fixture
def continued(csv_file: Path) -> ComparisonConfig:
    return load_comparison(write_grid(csv_file.parent, CONTINUED))


def lines_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def change(file: Path, line: int, columns: Mapping[str, str]) -> None:
    lines = lines_of(file)
    lines[line] |= columns
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_every_run_is_in_the_file_with_machine_code_and_corpus(csv_file):
    lines = lines_of(csv_file)
    assert len(lines) == 12
    assert len({line["config_sha256"] for line in lines}) == 12
    first = lines[0]
    expected = {
        "stage": "selection",
        "row": "dense",
        "optimizer.lr": "0.002",
        "seed": "1",
        "diverged": "False",
        "steps": "40",
        "tokens": "5120",
        "validation_bits_per_byte": "1.25",
        "test_bits_per_byte": "1.5",
        "tokens_per_s": "100.0",
        "peak_gib": "1.5",
        "state_gib": "0.5",
        "num_trainable": "7",
        "device": "CPU",
        "cpu_capability": "AVX2",
        "num_threads": "1",
        "torch": "2",
        "commit": "abc",
        "corpus": "c",
        "corpus_fingerprint": "f",
        "effective_rank": "",
    }
    assert {key: first[key] for key in expected} == expected
    assert float(first["validation_loss"]) == pytest.approx(2.11)
    assert float(first["test_loss"]) == pytest.approx(3.11)


def test_runs_in_the_file_are_finished_without_their_folders(csv_file, continued):
    state = report(continued, csv_file.parent / "after")
    assert state.due == ()
    assert all(not result.has_folder for result in [*state.selection, *state.report])
    assert (csv_file.parent / "after" / "runs.csv").read_text() == csv_file.read_text()
    # Negative control: without the file, everything is to be trained.
    without = load_comparison(write_grid(csv_file.parent))
    assert len(Comparison(without).state().due) == 6


def test_runs_can_be_in_several_files(csv_file):
    """Both have some in common, and neither has all."""
    lines = csv_file.read_text().splitlines(keepends=True)
    parts = [csv_file.with_name(name) for name in ("a.csv", "b.csv")]
    parts[0].write_text("".join(lines[:8]))
    parts[1].write_text("".join([lines[0], *lines[6:]]))
    grid = CONTINUED.replace('"runs.csv"', '"a.csv", "b.csv"')
    both = load_comparison(write_grid(csv_file.parent, grid))
    state = report(both, csv_file.parent / "after")
    assert state.due == ()
    assert (
        f"12 of these runs are from {parts[0]}, {parts[1]}:"
        in (csv_file.parent / "after" / "report.md").read_text()
    )
    change(parts[1], 0, {"test_loss": "1.0"})
    with pytest.raises(ConfigError, match=r"b.csv', line 2: an earlier .* \(.*a.csv', line 7"):
        Comparison(both)


def test_the_report_says_that_curves_are_missing(csv_file, continued):
    folder = csv_file.parent / "out" / "reports" / "after"
    state = report(continued, folder)
    text = (folder / "report.md").read_text()
    assert f"12 of these runs are from {csv_file}: their folders are not on this machine" in text
    assert "curves are missing" not in (csv_file.parent / "before" / "report.md").read_text()
    record = read_comparison(folder)
    assert "thin, seed 2: from finished_runs; its curves are missing" in record.notes
    assert record.runs == {}
    names = {path.name for path in write_pictures(folder, state, report_rows(state, {}))}
    assert "loss.png" in names


def test_only_missing_runs_are_trained(csv_file, continued):
    lines = csv_file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("report,thin,")]
    csv_file.write_text("".join(kept))
    due = Comparison(continued).state().due
    assert [(run.row, run.seed) for run in due] == [("thin", 2), ("thin", 3)]
    for run in due:
        finish(run, loss(run), loss(run) + 1)
    state = report(continued, csv_file.parent / "after")
    assert state.due == ()
    assert sum(result.has_folder for result in state.report) == 2
    assert len(lines_of(csv_file.parent / "after" / "runs.csv")) == 12


def test_a_run_of_another_configuration_is_not_used(csv_file, continued):
    base = csv_file.parent / "base.toml"
    base.write_text(base.read_text().replace("warmup_steps = 3", "warmup_steps = 4"))
    assert len(Comparison(continued).state().due) == 6


def test_a_run_of_another_seed_is_not_used(csv_file, continued):
    change(csv_file, 0, {"seed": "9"})
    (run,) = Comparison(continued).state().due
    assert (run.row, run.value("optimizer.lr")) == ("dense", 2e-3)


def test_a_run_that_diverged_stays_diverged(csv_file, continued):
    diverged = {"diverged": "True", "validation_loss": "inf", "test_loss": "inf", "tokens": ""}
    rates = [line["optimizer.lr"] for line in lines_of(csv_file)]
    change(csv_file, rates.index("0.002"), diverged)
    # Without it, 0.001 and 0.004 would have the same loss.
    change(csv_file, rates.index("0.004"), {"validation_loss": "2.5"})
    while finish_due(continued, loss):
        pass
    state = Comparison(continued).state()
    assert state.selection[0].has_diverged
    assert state.tuning.chosen["dense"] == {"optimizer.lr": 1e-3}
    assert state.tuning.chosen["thin"] == {"optimizer.lr": 2e-2}


def test_runs_of_a_gpu_may_lack_figures_of_speed_and_memory(csv_file, continued):
    for number in range(len(lines_of(csv_file))):
        change(csv_file, number, {"device": "H100", "peak_gib": "", "tokens_per_s": ""})
    state = report(continued, csv_file.parent / "after")
    rows = report_rows(state, {})
    assert {(row.peak_gib, row.tokens_per_s) for row in rows} == {(None, None)}
    change(csv_file, len(lines_of(csv_file)) - 1, {"peak_gib": "2.5"})
    rows = report_rows(Comparison(continued).state(), {})
    assert [row.peak_gib for row in rows] == [None, None, 2.5]


def test_runs_on_another_corpus_are_refused(csv_file, continued):
    assert Comparison(continued, "f").state().due == ()
    with pytest.raises(ConfigError, match=r"runs.csv: dense lr .* fingerprint f, and .* has g"):
        Comparison(continued, "g").state()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"validation_loss": "low"}, r"line 3: validation_loss = 'low': Input should be a valid"),
        ({"validation_loss": ""}, r"line 3: validation_loss and test_loss .* finite numbers"),
        ({"test_loss": "nan"}, r"line 3: validation_loss and test_loss .* finite numbers"),
        ({"seed": "-1"}, r"line 3: seed = '-1'"),
        ({"steps": ""}, r"line 3: steps = ''"),
        ({"tokens": ""}, r"line 3: tokens = '' of a run that has not diverged: expected"),
        ({"diverged": "perhaps"}, r"line 3: diverged = 'perhaps'"),
        ({"config_sha256": "abc"}, r"line 3: config_sha256 = 'abc'"),
        ({"corpus_fingerprint": ""}, r"line 3: corpus_fingerprint = ''"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_it(csv_file, columns, message):
    change(csv_file, 1, columns)
    with pytest.raises(ConfigError, match=f"finished_runs = .*runs.csv', {message}"):
        read_finished_runs(csv_file)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "has no column seed, diverged, config_sha256"),
        (b"stage,row,learning_rate,seed\n", "has no column diverged, config_sha256"),
        (b"\xff\xfe", r"cannot be read \(.*codec"),
        (None, r"cannot be read \(.*No such file"),
    ],
)
def test_a_file_that_is_no_list_of_runs_is_an_error(csv_file, contents, message):
    if contents is None:
        csv_file.unlink()
    else:
        csv_file.write_bytes(contents)
    with pytest.raises(ConfigError, match=f"finished_runs = .*runs.csv': {message}"):
        read_finished_runs(csv_file)


def test_a_truncated_line_is_an_error(csv_file):
    text = csv_file.read_text()
    csv_file.write_text(text[: len(text) - 40])
    with pytest.raises(ConfigError, match="line 13: config_sha256"):
        read_finished_runs(csv_file)


def test_two_results_of_one_run_are_an_error(csv_file):
    lines = csv_file.read_text().splitlines(keepends=True)
    csv_file.write_text("".join([*lines, lines[1]]))
    assert len(read_finished_runs(csv_file)) == 12, "the same result again is none"
    change(csv_file, 12, {"test_loss": "1.0"})
    message = r"line 14: an earlier line \(.*line 2\) has .* another test_loss; keep one"
    with pytest.raises(ConfigError, match=message):
        read_finished_runs(csv_file)
