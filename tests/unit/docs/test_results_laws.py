"""Laws of loss against size: known ones are found again, and what cannot be fitted is refused."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import results_data
import results_laws
import results_page
import results_tables
from support.made_up_runs import remove_claims, write_runs

from switchtitan.comparison.plan import Run
from switchtitan.comparison.statistics import Difference

SIZES = (1e5, 2.2e5, 4e5)
KNOWN = {"first": (1.5, 0.30), "second": (1.7, 0.25), "third": (1.6, 0.40)}
FLOOR = 1.4


def made_up(noise: float = 0.0, floor: float = FLOOR) -> dict[str, dict[float, dict[int, float]]]:
    """Losses of three rows and five seeds that follow known laws."""
    random = np.random.default_rng(3)
    return {
        row: {
            size: {
                seed: floor + scale * (size / SIZES[0]) ** -exponent + noise * random.normal()
                for seed in range(5)
            }
            for size in SIZES
        }
        for row, (scale, exponent) in KNOWN.items()
    }


@pytest.mark.parametrize("floor", [0.4, 1.4, 2.5])
def test_known_laws_are_found(floor):
    laws = results_laws.fit_laws(made_up(floor=floor))
    assert list(laws.floors.values()) == pytest.approx([floor] * 5, abs=1e-3)
    for row, (scale, exponent) in KNOWN.items():
        assert laws.rows[row].scale.mean == pytest.approx(scale, abs=1e-3)
        assert laws.rows[row].exponent.mean == pytest.approx(exponent, abs=1e-3)


def test_the_interval_of_noisy_losses_holds_the_known_law_and_has_a_width():
    laws = results_laws.fit_laws(made_up(noise=1e-3))
    for row, (_, exponent) in KNOWN.items():
        of = laws.rows[row].exponent
        assert of.low is not None
        assert of.high is not None
        assert of.low < exponent < of.high
        assert of.high - of.low > 1e-3


@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_a_given_floor_is_kept_and_the_rest_is_fitted_to_it(floor):
    laws = results_laws.fit_laws(made_up(floor=floor, noise=1e-4), floor)
    assert list(laws.floors.values()) == pytest.approx([floor] * 5, abs=1e-8)
    for row, (scale, exponent) in KNOWN.items():
        assert laws.rows[row].scale.mean == pytest.approx(scale, abs=1e-3)
        assert laws.rows[row].exponent.mean == pytest.approx(exponent, abs=1e-3)
    wrong = results_laws.fit_laws(made_up(floor=FLOOR), 0.0)
    assert all(wrong.rows[row].exponent.mean < KNOWN[row][1] / 1.5 for row in KNOWN)


def test_noise_as_of_runs_leaves_the_floor_unknown_and_no_floor_of_zero_exponents():
    """What docs/RESULTS.md says of its fits: E is not determined, a power law is."""
    free = results_laws.fit_laws(made_up(noise=8e-3))
    assert max(free.floors.values()) - min(free.floors.values()) > 0.1
    assert all(0 <= floor < 2.9 for floor in free.floors.values())
    fixed = results_laws.fit_laws(made_up(noise=8e-3), 0.0)
    for row in KNOWN:
        assert width(fixed.rows[row].exponent) < width(free.rows[row].exponent) / 3


def width(of: Difference) -> float:
    assert of.low is not None
    assert of.high is not None
    return of.high - of.low


def test_a_diverged_run_has_no_law():
    losses = made_up()
    losses["second"][SIZES[1]][4] = math.inf
    with pytest.raises(ValueError, match="row second has a run that diverged"):
        results_laws.fit_laws(losses)


def test_laws_need_three_sizes_of_every_row_and_seed():
    losses = made_up()
    two = {row: {size: of_row[size] for size in SIZES[:2]} for row, of_row in losses.items()}
    with pytest.raises(ValueError, match="only 2 sizes"):
        results_laws.fit_laws(two)
    del losses["second"][SIZES[1]][4]
    with pytest.raises(ValueError, match="row second has other sizes or seeds"):
        results_laws.fit_laws(losses)


def test_a_distance_that_grows_by_a_tenth_per_doubling():
    sizes = (1e5, 2e5, 4e5)
    distances = {
        size: {seed: 0.1 * place + 0.01 * seed for seed in range(3)}
        for place, size in enumerate(sizes)
    }
    slope = results_laws.per_doubling(distances)
    assert slope.mean == pytest.approx(0.1)
    assert not slope.holds_zero
    flat = results_laws.per_doubling({size: {0: 0.2, 1: 0.3} for size in sizes})
    assert flat.mean == pytest.approx(0.0, abs=1e-12)


METHODS = {"full rank": "full_rank", "LoRA": "lora", "Muon": "muon"}
SETTINGS = {"small": "h64", "middle": "h96", "large": "h128"}


def made_up_loss(run: Run) -> float:
    """LoRA's distance grows by 0.1 from size to size; Muon's is 0, with noise."""
    place = [f"-{end}" in run.row for end in ("h64", "h96", "h128")].index(True)
    noise = (run.seed * (len(run.row) + place) % 3 - 1) / 1000
    is_lora = run.row.startswith("lora-h")
    return 3 - place / 4 + run.seed / 100 + noise + is_lora * (0.1 + 0.1 * place)


@pytest.fixture
def of(tmp_path: Path) -> results_data.Comparison:
    write_runs(tmp_path, "sizes_python", made_up_loss)
    return results_data.read_comparison(tmp_path, "sizes_python")


def test_parameters_of_the_declared_sizes(of):
    sizes = [of.num_in_blocks(f"lora-{end}") for end in (*SETTINGS.values(), "h64-long")]
    assert sizes == [100_352, 221_184, 401_408, 100_352]
    for end, num, tokens in zip((*SETTINGS.values(), "h64-long"), sizes, (20, 20, 20, 60)):  # noqa: B905
        training = of.config(f"muon-{end}").training
        seen = training.steps * training.global_batch_size * 64
        assert seen == pytest.approx(tokens * num, rel=1e-3)


def test_the_table_of_sizes_has_each_distance_to_full_rank_of_its_size(of):
    head, _, full, lora, muon = results_tables.size_table(of, METHODS, SETTINGS).splitlines()
    assert head == "|  | small | middle | large |"
    assert re.findall(r"\d\.\d+", full) == ["3.130", "2.880", "2.630"]
    distances = [float(text) for text in re.findall(r"\*\*\+(0\.\d+)", lora)]
    assert distances == pytest.approx([0.1, 0.2, 0.3], abs=2e-3)
    assert "**" not in muon


def test_the_table_of_laws_has_the_exponents_of_both_fits(of):
    sizes = {row: of.sizes(row, SETTINGS.values()) for row in ("full_rank", "lora")}
    laws, power_laws = results_laws.fit_laws(sizes), results_laws.fit_laws(sizes, 0.0)
    head, _, full, lora = results_tables.law_table(laws, power_laws).splitlines()
    assert head == "|  | A | a | a, if E is 0 |"
    for line, row in ((full, "full_rank"), (lora, "lora")):
        _, title, *cells, _ = line.split("|")
        assert title.strip() == row
        means = [float(cell.split()[0]) for cell in cells]
        rows = (laws.rows[row], power_laws.rows[row])
        assert means == pytest.approx(
            [rows[0].scale.mean, rows[0].exponent.mean, rows[1].exponent.mean], abs=5e-4
        )


def test_changes_of_distances_are_bold_where_they_differ_from_zero(of):
    slopes = {
        title: results_laws.per_doubling(of.size_distances(row, "full_rank", SETTINGS.values()))
        for title, row in (("LoRA", "lora"), ("Muon", "muon"))
    }
    _, _, lora, muon = results_tables.distance_table({"doubled": slopes}).splitlines()
    assert float(lora.split("**+")[1].split()[0]) == pytest.approx(0.1, abs=2e-3)
    assert "**" not in muon


def test_the_table_of_rates_has_those_of_each_size(of):
    head, _, full, *_ = results_tables.rate_table(of, METHODS, SETTINGS).splitlines()
    assert head == "| lr, other_lr | small | middle | large |"
    # `write_runs` selects the second value of every key; larger sizes have declared ones.
    assert full == "| full rank | 0.002, 0.01 | 0.004, 0.02 | 0.002, 0.01 |"


def test_the_change_of_a_distance_between_two_settings(of):
    change = of.change_of_distance("lora", "full_rank", "h64", "h128")
    assert change.mean == pytest.approx(0.2, abs=2e-3)
    assert change.low <= change.mean <= change.high
    assert of.change_of_distance("muon", "full_rank", "h64", "h128").holds_zero


def test_the_page_has_a_section_of_sizes(tmp_path):
    folder = Path(shutil.copytree(results_page.FOLDER, tmp_path / "results"))
    heading = "## How does the distance change with size and tokens?"
    remove_claims(folder)
    write_runs(folder, "sizes_python", made_up_loss)
    _, section = results_page.results_pages(folder)[results_page.RESULTS].split(heading)
    section = section.split("\n## ")[0]
    assert "| lr, other_lr | 0.10 M | 0.22 M | 0.40 M | 0.10 M, 60 tokens |" in section
    assert "|  | 0.10 M | 0.22 M |\n" in section
    assert "|  | 0.40 M | 0.10 M, 60 tokens |\n" in section
    assert section.count("| LoRA | ") == 5
    assert "{" not in section
