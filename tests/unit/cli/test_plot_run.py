import importlib
from pathlib import Path
from types import ModuleType

import pytest

from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.metrics import TensorBoardWriter

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.plot_run")


def write_run(folder: Path, *, switches: bool) -> Path:
    writer = TensorBoardWriter(folder / TENSORBOARD_FOLDER, 0)
    writer.write(0, {"loss/validation": 5.5})
    for step in (1, 2, 3):
        writer.write(step, {"loss/train": 5.0 / step, "optimizer/lr": 0.5 * step})
        if switches:
            writer.write(
                step,
                {
                    "switch/vectors_switched_total": 3.0 * step,
                    "switch/candidate_coverage": 0.25 * step,
                },
            )
    writer.close()
    return folder


def test_curves_equal_the_runs_scalars(script: ModuleType, tmp_path: Path) -> None:
    curves = script.read_curves(write_run(tmp_path / "run", switches=True))
    assert curves["optimizer/lr"] == ([1, 2, 3], [0.5, 1.0, 1.5])
    assert curves["loss/validation"] == ([0], [5.5])


@pytest.mark.parametrize(("switches", "titles"), [(True, 3), (False, 2)])
def test_panels_without_data_are_not_drawn(
    script: ModuleType, tmp_path: Path, switches: bool, titles: int
) -> None:
    figure = script.draw(
        {"run": script.read_curves(write_run(tmp_path / "run", switches=switches))}
    )
    assert sum(bool(axes.get_title()) for axes in figure.axes) == titles


def test_runs_are_drawn_into_one_picture(script: ModuleType, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one/run", switches=True),
        write_run(tmp_path / "two/run", switches=False),
    ]
    script.main([*map(str, runs), "--output", str(tmp_path / "new folder/curves.png")])
    assert (tmp_path / "new folder/curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(script.labelled(runs)) == {str(run) for run in runs}


def test_a_run_without_losses_can_be_drawn(script: ModuleType) -> None:
    figure = script.draw({"run": {"optimizer/lr": ([1, 2], [0.5, 1.0])}})
    figure.draw_without_rendering()
    assert [list(line.get_ydata()) for axes in figure.axes for line in axes.lines] == [[0.5, 1.0]]


def test_no_curve_runs_through_the_legend(script: ModuleType, tmp_path: Path) -> None:
    for names in (["one"], ["one", "two", "three", "four", "five", "six"]):
        curves = {
            name: script.read_curves(write_run(tmp_path / name, switches=True)) for name in names
        }
        figure = script.draw(curves)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        below = legend.get_window_extent()
        assert below.y0 >= 0
        for axes in figure.axes:
            assert axes.get_tightbbox().y0 >= below.y1
            # The panels keep their size, however many runs there are.
            assert axes.get_window_extent().height >= 100
        labels = [text.get_text() for text in legend.get_texts()]
        assert len(labels) == 2 * len(names) + 2
        if len(names) > 1:
            half = len(labels) // 2
            assert [label.split(", ")[0] for label in labels[: half - 1]] == names
            assert [label.split(", ")[0] for label in labels[half:-1]] == names


def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", switches=True)
    for arguments, message in [
        ([str(tmp_path), "--output", "x.png"], f"{tmp_path}: no TensorBoard scalars"),
        ([str(run), "--output", str(tmp_path / "x.gmp")], "x.gmp: cannot write the figure"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
