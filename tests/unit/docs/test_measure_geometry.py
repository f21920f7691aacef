"""scripts/measure_geometry.py: the runs and the columns of docs/results/geometry_python.csv."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import measure_geometry
import pytest
import results_tables
import torch
from support.made_up_runs import made_up_loss, write_runs
from torch import Tensor

from switchtitan.comparison.plan import Run
from switchtitan.geometry.activations import Similarity
from switchtitan.geometry.landscape import Barrier
from switchtitan.geometry.matrices import matrix_geometry
from switchtitan.geometry.measure import Geometry, Sharpness
from switchtitan.geometry.spectral import Layers, SpectralGeometry, WeightGeometry


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in measure_geometry.SOURCES:
        write_runs(tmp_path, name, lambda run: made_up_loss(run, 0.1))
    return tmp_path


def test_every_method_is_trained_with_the_values_that_were_selected_for_it(results):
    runs = measure_geometry.planned(results)
    configs = {title: run.config() for title, run in runs.items()}
    methods = {config.method.name for config in configs.values()}
    assert methods == {
        *("full_rank", "lora", "switchlora", "relora", "low_rank", "sltrain"),
        *("galore", "fira", "apollo"),
    }
    assert {config.optimizer.name for config in configs.values()} == {"adamw", "muon", "scale"}
    assert next(iter(runs)) == "full rank"
    # `write_runs` selects the second value of every key.
    assert (configs["LoRA"].optimizer.lr, configs["LoRA"].optimizer.other_lr) == (2e-2, 1e-2)
    assert configs["ReLoRA"].optimizer == configs["LoRA"].optimizer
    for config in configs.values():
        assert (config.checkpoint.interval, config.checkpoint.keep_latest) == (200, 5)
        assert config.training.steps == 1000
        assert config.job.seed == measure_geometry.SEED
    assert len({run.folder for run in runs.values()}) == len(runs)


def test_columns_are_those_of_the_newest_checkpoint_and_the_last_change(run_with_two_layers):
    columns = measure_geometry.numbers(run_with_two_layers)
    assert columns["loss"] == 2.5
    # Two layers with effective ranks 4 (equal values) and 1 (one value), and their last change.
    assert columns["weight_effective_rank"] == pytest.approx((4 + 1) / 2)
    assert columns["update_stable_rank"] == pytest.approx((2 + 1) / 2)
    assert "weight_relative_norm" not in columns
    assert columns["update_relative_norm"] == pytest.approx((2**0.5 / 4 + 1 / 8) / 2)
    assert columns["random_sharpness"] == pytest.approx(0.2)
    assert columns["principal_sharpness"] == 0.7
    assert columns["largest_barrier"] == 0.05
    assert columns["barrier_to_full_rank"] == 1.5
    assert columns["activation_linear_cka"] == pytest.approx(0.85)


def test_the_table_has_a_line_for_each_run(tmp_path, run_with_two_layers):
    row = {"title": "GaLore", "run": "galore-r16", "config_sha256": 64 * "a"}
    row |= measure_geometry.numbers(run_with_two_layers)
    full_rank = {key: value for key, value in row.items() if key != "barrier_to_full_rank"}
    file = tmp_path / "geometry.csv"
    file.write_text(measure_geometry.table([full_rank | {"title": "full rank"}, row]))
    columns = {"effective rank": ("weight_effective_rank", 1), "loss": ("loss", 3)}
    columns |= {"barrier": ("barrier_to_full_rank", 2)}
    measured = results_tables.read_geometry(file)
    assert measured["full rank"]["loss"] == 2.5
    *_, first, last = results_tables.geometry_table(measured, columns).splitlines()
    assert first == "| full rank | 2.5 | 2.500 | - |"
    assert last == "| GaLore | 2.5 | 2.500 | 1.50 |"
    assert results_tables.read_geometry(tmp_path / "none.csv") == {}


def test_the_json_file_of_a_run_is_kept_when_another_run_is_measured(
    results, tmp_path, monkeypatch, run_with_two_layers
):
    runs = {
        title: replace(run, folder=tmp_path / title)
        for title, run in measure_geometry.planned(results).items()
        if title in ("full rank", "Fira", "GaLore")
    }

    def train(_: object, to_train: Sequence[Run], *__: object) -> None:
        for run in to_train:
            run.folder.mkdir(exist_ok=True)

    monkeypatch.setattr(measure_geometry.Runner, "run_all", train)
    monkeypatch.setattr(measure_geometry, "open_run", lambda title, folder: title)
    monkeypatch.setattr(measure_geometry, "prepare", lambda run, other, options: run)
    monkeypatch.setattr(measure_geometry, "measure", lambda run: run_with_two_layers)
    monkeypatch.setattr(measure_geometry, "as_json", lambda measured, options: {"runs": 1})
    for title in ("Fira", "GaLore"):
        rows = measure_geometry._measure({name: runs[name] for name in ("full rank", title)}, 2)
        assert [row["run"] for row in rows.values()] == [
            runs["full rank"].name,
            runs[title].name,
        ]
        assert rows[title]["loss"] == 2.5
    for run in runs.values():
        assert (run.folder / "geometry.json").exists()


def test_rows_of_the_file_are_kept_and_full_rank_is_measured_with_those_that_are_missing(
    results, tmp_path, monkeypatch, run_with_two_layers
):
    columns = measure_geometry.numbers(run_with_two_layers)
    trained: list[str] = []

    def measure(runs, jobs):
        trained.extend(runs)
        return {
            title: measure_geometry.identity(title, run) | columns for title, run in runs.items()
        }

    file = tmp_path / "geometry.csv"
    monkeypatch.setattr(measure_geometry, "FOLDER", results)
    monkeypatch.setattr(measure_geometry, "CSV_FILE", file)
    monkeypatch.setattr(measure_geometry, "_measure", measure)
    titles = list(measure_geometry.planned(results))
    measure_geometry.main([])
    assert trained == titles
    whole = file.read_text()

    trained.clear()
    measure_geometry.main([])
    assert not trained
    measure_geometry.main(["--again"])
    assert trained == titles

    trained.clear()
    file.write_text("".join(line for line in whole.splitlines(True) if not line.startswith("Fira")))
    measure_geometry.main([])
    assert trained == ["full rank", "Fira"]
    assert file.read_text() == whole

    trained.clear()
    name = measure_geometry.planned(results)["Fira"].name
    file.write_text(whole.replace(name, name.replace("lr 0.02", "lr 0.04"), 1))
    measure_geometry.main([])
    assert trained == ["full rank", "Fira"]
    assert file.read_text() == whole

    trained.clear()
    keys = measure_geometry.RELORA["set"]["method"] | {"reset_interval": 100}
    with monkeypatch.context() as patch:
        patch.setitem(measure_geometry.RELORA, "set", {"method": keys})
        measure_geometry.main([])
    assert trained == ["full rank", "ReLoRA"]
    assert file.read_text() != whole

    file.write_text(whole)
    changed = whole.replace(",200 400,64,2.5,", ",200 400,64,2.6,", 1)
    assert changed != whole
    without_fira = [line for line in changed.splitlines(True) if not line.startswith("Fira")]
    file.write_text("".join(without_fira))
    with pytest.raises(ValueError, match=r"full rank's loss was 2\.6 and is 2\.5 now.*--again"):
        measure_geometry.main([])
    assert file.read_text() == "".join(without_fira)


def test_a_comparison_that_is_not_finished_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"own_rate_python\.csv: every row has a run of 0"):
        measure_geometry.planned(tmp_path)


@pytest.fixture
def run_with_two_layers() -> Geometry:
    """A run whose checkpoints, singular values and losses were made up."""
    even, single = torch.ones(4), torch.tensor([3.0, 0.0, 0.0, 0.0])
    first = WeightGeometry(None, 200, layers(single, single))
    last = WeightGeometry(None, 400, layers(even, single))
    earlier = WeightGeometry(0, 200, layers(single, single, norms=(1.0, 1.0)))
    change = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    updates = [earlier, WeightGeometry(200, 400, layers(*change, norms=(4.0, 8.0)))]
    found = Geometry(
        RunOfSteps("GaLore", [200, 400]),  # type: ignore[arg-type]
        num_tokens=64,
        spectral=SpectralGeometry([first, last], updates, []),
        sharpness=Sharpness(400, 2.5, random=[0.1, 0.3], principal=[0.7, 0.9], principal_shares=[]),
    )
    found.barriers = {(0, 200): barrier(0.05), (200, 400): barrier(-0.01)}
    found.barriers_to_other = {200: barrier(0.5), 400: barrier(1.5)}
    block = Similarity(linear_cka=0.8, cosine=0.5, relative_l2=1.0)
    found.activations = {
        200: {"0": block},
        400: {"0": block, "1": block._replace(linear_cka=0.9)},
    }
    return found


class RunOfSteps(NamedTuple):
    label: str
    steps: list[int]


def layers(*values: Tensor, norms: Sequence[float | None] = (None, None)) -> Layers:
    return {
        str(number): matrix_geometry(of_layer.double(), norm)
        for number, (of_layer, norm) in enumerate(zip(values, norms, strict=True))
    }


def barrier(height: float) -> Barrier:
    return Barrier(height, 0.5, [0.0, 0.5, 1.0], [1.0, 1.0 + height, 1.0])
