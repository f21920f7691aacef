"""scripts/plot_results.py: the points and labels of the pictures of results."""

from pathlib import Path

import plot_results
import pytest
import results_data
from results_data import Comparison, read_comparison
from results_tables import read_geometry
from support.made_up_runs import made_up_loss, write_runs


def finished(folder: Path, name: str, last_seed: int) -> Comparison:
    """A declared comparison that is finished up to a seed, with made-up losses."""
    header, *lines = write_runs(folder, name, lambda run: made_up_loss(run, 0.1))
    seed = header.split(",").index("seed")
    kept = [line for line in lines if int(line.split(",")[seed]) <= last_seed]
    assert 0 < len(kept) < len(lines)
    (folder / f"{name}.csv").write_text("".join([header, *kept]))
    return read_comparison(folder, name)


@pytest.fixture(autouse=True)
def intervals_of_two_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_data, "_MIN_SEEDS", 2)


@pytest.fixture
def geometry(tmp_path: Path) -> Path:
    """The geometry of 12 runs: more than there are colours."""
    lines = [f"row {number},50 250 400,{3 + number},{number},{2 * number}" for number in range(12)]
    file = tmp_path / "geometry.csv"
    header = "title,steps,loss,weight_effective_rank,update_effective_rank"
    file.write_text("\n".join([header, *lines]) + "\n")
    return file


def test_ablations_have_a_point_for_each_row_and_say_of_how_many_seeds(tmp_path):
    of = finished(tmp_path, "switchlora_ablations", last_seed=3)
    (axes,) = plot_results.draw_ablations(of).axes
    changed = [row for row in of.rows if row != of.baseline and row.startswith(of.baseline)]
    assert len(changed) > 3
    assert [label.get_text() for label in axes.get_yticklabels()] == list(map(of.title, changed))
    means = [of.versus(row, of.baseline, "validation").mean for row in changed]
    points = [points for points, _, _ in axes.containers]
    assert [float(line.get_xdata()[0]) for line in points] == pytest.approx(means)
    assert axes.get_xlabel() == ("validation loss minus published keys', 95 % interval of 2 seeds")


def test_every_seed_has_a_point_and_the_label_names_them(tmp_path):
    of = finished(tmp_path, "rank_16_gentler", last_seed=6)
    (axes,) = plot_results.draw_seeds(of).axes
    assert len(of.rows) > 2
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 1] * len(of.rows)
    for row, values, mean in zip(of.rows, axes.lines[::2], axes.lines[1::2], strict=True):
        losses = list(of.losses(row).values())
        assert list(values.get_xdata()) == losses
        assert float(mean.get_xdata()[0]) == pytest.approx(sum(losses) / 2)
    assert axes.get_xlabel() == "test loss on seeds 5 and 6; the bar is their mean"


def test_geometry_has_a_point_for_each_run_and_says_how_long_the_last_change_is(geometry):
    measured = read_geometry(geometry)
    figure = plot_results.draw_geometry(measured, plot_results.steps_of_last_change(geometry))
    weights, changes = figure.axes
    assert weights.get_xlabel() == "effective rank of the weights"
    assert changes.get_xlabel() == "effective rank of their change in the last 150 steps"
    for axes, factor in ((weights, 1), (changes, 2)):
        points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines]
        assert points == [(factor * number, 3 + number) for number in range(12)]
    looks = {(line.get_color(), line.get_marker()) for line in changes.lines}
    assert len(looks) == 12
    names = [text.get_text() for text in changes.get_legend().get_texts()]
    assert names == list(measured)


def test_last_changes_of_different_length_are_an_error(geometry):
    geometry.write_text(geometry.read_text().replace("50 250 400", "50 200 400", 1))
    with pytest.raises(ValueError, match=r"geometry\.csv: the rows' last .* \[150, 200\] steps"):
        plot_results.steps_of_last_change(geometry)
