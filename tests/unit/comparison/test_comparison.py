"""Results of runs in their folders and in CSV files, and the report on them."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.comparisons import (
    GRID,
    LR,
    finish,
    finish_all,
    loss_of,
    result_of,
    train,
    write_curves,
    write_grid,
)
from support.trained import save_run

from switchtitan.comparison.comparison import Comparison, follow
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.report import draw_curves, markdown, table, write_report
from switchtitan.comparison.runs import Run, plan_run, read_csv, read_folder
from switchtitan.errors import ConfigError
from switchtitan.job.config import parse_arguments
from switchtitan.spectra.weight_change import checkpoint_spectra


@pytest.fixture
def comparison(tmp_path):
    return load_comparison(write_grid(tmp_path))


# ---- The report


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
    assert cells(state, "lr") == ["0.002", "0.02", "0.02"]
    assert cells(state, "verdict") == ["-", "differs", "differs"]
    assert cells(state, "validation loss")[0] == "1.1025 ± 0.0007"
    folder = tmp_path / "report"
    write_report(folder, state)
    text = (folder / "report.md").read_text()
    assert "12 of 12 runs are finished" in text
    assert "| thin | 0.02 | 3.1500 ± 0.0707 |" in text
    assert "- thin: 0.01: 2.2010, **0.02: 2.1010**, 0.04: 2.2010" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_can_be_written_after_the_first_run(comparison, tmp_path):
    run = follow(comparison, lambda run: None).due[0]
    state = follow(comparison, {run: result_of(run, 2.0, 3.0)}.get)
    assert cells(state, "lr") == ["-", "-", "-"]
    write_report(tmp_path / "report", state)
    assert "1 of 12 runs are finished" in (tmp_path / "report" / "report.md").read_text()


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


def test_rows_of_other_lengths_have_their_tokens_in_the_table(tmp_path):
    thin = 'set.method = {{ name = "lora", rank = 4 }}\n'
    grid = GRID.replace("[[rows]]", 'differ_in = ["training"]\n[[rows]]', 1)
    grid = grid.replace(thin, thin + "set.training = {{ steps = 20 }}\n")
    state = reported(load_comparison(write_grid(tmp_path, grid)), (2, 3), (2, 3), (2, 3))
    assert cells(state, "M tokens") == ["0.01", "0.00", "0.01"]
    assert "2560 and 5120 tokens per run of corpus c" in markdown(state)


def test_the_picture_has_a_curve_for_each_finished_run_with_a_folder(comparison):
    state = reported(comparison, (2.1, 2.2), (3.1, 3.2), (2.6, math.inf))
    for row, finals in (("dense", (3.0, 3.1)), ("thin-balanced", (3.2, math.nan))):
        for run, final in zip(state.reported(row), finals, strict=True):
            write_curves(run.folder, final)
    (axes,) = draw_curves(state).axes
    # Seeds of a row have one label.
    labels = [line.get_label() for line in axes.lines]
    assert (
        [labels[0], labels[2]] == ["dense", "thin-balanced"] == axes.get_legend_handles_labels()[1]
    )
    assert len(labels) == 3
    assert max(axes.lines[0].get_xdata()) == pytest.approx(60 * 128 / 1e6)


# ---- Runs in folders


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


def test_the_effective_rank_is_that_of_the_last_checkpoint(corpora, tmp_path):
    folder = Path(shutil.copytree(save_run(corpora / "effective-rank", "lora"), tmp_path / "run"))
    words = ("--config", str(folder / "config.toml"), "--job.output_dir", str(folder))
    run = Run("lora", {}, 1, words, parse_arguments(words, 1))
    finish(run, 3.0, step=run.config.training.steps)
    spectra = checkpoint_spectra(folder / "checkpoints" / "step-000000007").values()
    shares = [values.double() / values.double().sum() for values in spectra]
    ranks = [torch.special.entr(of).sum().exp().item() for of in shares]
    # Spectra are in fp32.
    assert read_folder(run).effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    shutil.rmtree(folder / "checkpoints")
    assert read_folder(run).effective_rank is None


# ---- Runs in CSV files


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


def change(file, line, **columns):
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    lines[line] |= columns
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_every_run_is_in_the_file_with_machine_code_and_corpus(csv_file):
    with csv_file.open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len({line["config_sha256"] for line in lines}) == 12
    expected = {"row": "dense", LR: "0.001", "seed": "1", "steps": "40", "diverged": "False"}
    expected |= {"tokens": "5120", "test_bits_per_byte": "1.5", "num_trainable": "7"}
    expected |= {"state_gib": "0.5", "device": "CPU", "torch": "2", "tokens_per_s": "100.0"}
    expected |= {"commit": "abc", "corpus": "c", "corpus_fingerprint": "f", "effective_rank": ""}
    assert {key: lines[0][key] for key in expected} == expected
    assert float(lines[0]["validation_loss"]) == pytest.approx(1.201)
    assert float(lines[0]["test_loss"]) == pytest.approx(2.201)


def test_runs_in_a_file_are_finished_without_their_folders(csv_file):
    state = continued(csv_file).state()
    assert state.due == []
    folder = csv_file.parent / "report"
    write_report(folder, state)
    assert (folder / "runs.csv").read_text() == csv_file.read_text()
    # A report's own file counts too.
    csv_file.unlink()
    assert continued(csv_file, GRID).state().due == []


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
    write_report(csv_file.parent / "after", finish_all(comparison))
    assert (csv_file.parent / "after" / "runs.csv").read_text() == "".join(lines)


def test_a_run_of_another_configuration_or_corpus_is_not_used(csv_file):
    config = continued(csv_file).config
    assert Comparison(config, csv_file.parent / "report", "f").state().due == []
    with pytest.raises(ConfigError, match=r"dense.*lr-.* f, .* g"):
        Comparison(config, csv_file.parent / "report", "g").state()
    grid = CONTINUED.replace("rank = 4", "rank = 3")
    assert {run.row for run in continued(csv_file, grid).state().due} == {"thin"}


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        ({"validation_loss": "low"}, ("line 3", "validation_loss", "'low'")),
        ({"test_loss": ""}, ("line 3", "loss/test", "required")),
        ({"steps": ""}, ("line 3", "step")),
        ({"config_sha256": "abc"}, ("line 3", "config_sha256", "'abc'")),
        (b"row,seed\nb,1\n", ("line 2", "config_sha256")),
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
        read_csv(csv_file)
    for fragment in ("runs.csv", *fragments):
        assert fragment in str(caught.value)
