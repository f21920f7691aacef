"""Pages of results: every number from our runs is computed from the CSV files of docs/results."""

import csv
import math
import re
import shutil
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import results_data
import results_laws
import results_page
import results_tables
from support.made_up_runs import made_up_distance, made_up_loss, write_runs

ONE_RATE = results_page.PAGES["RESULTS_ONE_RATE.md.jinja"]


@pytest.fixture
def stats():
    from scipy import stats

    return stats


@pytest.fixture
def folder(tmp_path):
    """A copy of the templates and the CSV files."""
    return Path(shutil.copytree(results_page.FOLDER, tmp_path / "results"))


def change_losses(file, row, by):
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line in lines:
        if line["row"] == row:
            line["test_loss"] = str(float(line["test_loss"]) + by)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


# ---- The pages


def test_another_loss_gives_another_page(folder):
    before = results_page.results_pages(folder)[ONE_RATE]
    change_losses(folder / "rank_16.csv", "galore-r16", 0.01)
    assert results_page.results_pages(folder)[ONE_RATE] != before


def test_a_sentence_that_the_losses_do_not_support_is_an_error(folder):
    change_losses(folder / "rank_16.csv", "apollo-r16", 0.1)
    with pytest.raises(ValueError, match="APOLLO is ahead"):
        results_page.results_pages(folder)


@pytest.mark.parametrize(
    ("text", "is_typed"),
    [
        ("a loss of 2.9602", True),
        ("closes 92 % of the gap", True),
        ("{{ 92 }} %", True),
        ("{% for x in ('a 2.96',) %}{{ x }}{% endfor %}", True),
        ("`0.1` and 0.2 and `0.3`", True),
        ("the ratio `0.1` of 5 frozen steps, seeds 2, 3 and 4", False),
        ("torch 2.13.0 and [arXiv 2406.06564](https://arxiv.org/abs/2406.06564)", False),
        ("{% call published() %}34.06, 5 % of it{% endcall %}", False),
        ("{{ keys.losses('switchlora-r16-decay-ratio-0.4') }}", False),
    ],
)
def test_a_number_that_is_typed_by_hand_is_found(text, is_typed):
    assert bool(results_page.typed_numbers(text)) == is_typed


# ---- Their statistics


def test_differences_are_those_of_a_paired_t_test(stats):
    losses = {}
    with (results_page.FOLDER / "rank_32.csv").open() as stream:
        for line in csv.DictReader(stream):
            if line["stage"] == "report":
                losses.setdefault(line["row"], []).append(float(line["test_loss"]))
    paired = stats.ttest_rel(losses["switchlora-r32"], losses["full_rank"])
    low, high = paired.confidence_interval()
    of = results_data.read_comparison(results_page.FOLDER, "rank_32")
    assert of.rows == list(losses)
    versus = of.versus("switchlora-r32", "full_rank")
    assert (versus.difference.low, versus.difference.high) == pytest.approx((low, high))
    assert versus.difference.p == pytest.approx(paired.pvalue)


def test_p_values_of_pairs_are_adjusted_over_the_pairs(stats):
    of = results_data.read_comparison(results_page.FOLDER, "preset_python")
    pairs = [
        ("switchlora-gentle-r16", "lora-balanced-r16"),
        ("switchlora-gentle-muon-r16", "full_rank"),
    ]
    larger, smaller = (
        stats.ttest_rel(*(list(of.losses(row).values()) for row in pair)).pvalue for pair in pairs
    )
    assert larger > smaller
    assert [each.adjusted_p for each in of.pairs(pairs)] == pytest.approx([larger, 2 * smaller])


def test_the_change_of_a_distance_is_a_paired_t_test(folder, stats):
    for name, distance in (("one_rate", 0.1), ("own_rate", 0.04)):
        write_runs(folder, f"{name}_python", lambda run, d=distance: made_up_loss(run, d))
    one = results_data.read_comparison(folder, "one_rate_python")
    own = results_data.read_comparison(folder, "own_rate_python")
    found = {of.title: of for of in results_data.changes(one, own)}
    assert len(found) == len(one.declared.rows) - 1
    before, after = (
        [made_up_distance(seed, "lora-r16", distance) for seed in one.seeds]
        for distance in (0.1, 0.04)
    )
    lora = found["LoRA"]
    assert lora.before.mean == pytest.approx(mean(before))
    assert lora.after.mean == pytest.approx(mean(after))
    paired = stats.ttest_rel(after, before).confidence_interval()
    assert (lora.change.difference.low, lora.change.difference.high) == pytest.approx(paired)


# ---- Their runs


def test_a_seed_counts_once_every_row_has_a_run_of_it(folder):
    header, *lines = write_runs(folder, "own_rate_python", lambda run: made_up_loss(run, 0.04))
    seeds = [int(line["seed"]) for line in csv.DictReader([header, *lines])]

    def keep(*wanted):
        kept = [line for line, seed in zip(lines, seeds, strict=True) if seed in wanted]
        (folder / "own_rate_python.csv").write_text("".join([header, *kept[:-1]]))

    keep(2, 3, 4, 5)
    own = results_data.read_comparison(folder, "own_rate_python")
    assert results_tables.seeds(own) == "2, 3 and 4"
    assert results_tables.missing(own) == " (not finished: 5 and 6)"
    keep(2, 3, 4)
    with pytest.raises(ValueError, match=r"own_rate_python\.csv: every row has a run of 2 seed"):
        results_data.read_comparison(folder, "own_rate_python")


def test_a_diverged_run_is_no_number(folder):
    lines = write_runs(folder, "one_rate_python", lambda run: made_up_loss(run, 0.1))
    diverged = [
        re.sub(r",False,(\d+,\d+),[\d.]+,[\d.]+,", r",True,\1,,,", line)
        if line.startswith("report,lora-r16,")
        else line
        for line in lines
    ]
    (folder / "one_rate_python.csv").write_text("".join(diverged))
    of = results_data.read_comparison(folder, "one_rate_python")
    (line,) = (row for row in results_tables.results_table(of).splitlines() if "| LoRA |" in row)
    assert line.endswith("| diverged | diverged | diverged |")


def test_runs_that_contradict_each_other_are_refused(folder):
    file = folder / "rank_32.csv"
    given = file.read_text()
    file.write_text(given + "report,lora-r32\n")
    with pytest.raises(ValueError, match=r"rank_32.csv, line 54"):
        results_data.read_comparison(folder, "rank_32")
    file.write_text(given.replace("report,lora-r32,0.02,3", "report,lora-r32,0.01,3"))
    with pytest.raises(ValueError, match="lora-r32"):
        results_data.read_comparison(folder, "rank_32").chosen("lora-r32")
    file.write_text(given)
    change_losses(file, "full_rank", 0.01)
    with pytest.raises(ValueError, match="full_rank"):
        results_data.read_comparison(folder, "rank_16", "rank_32")


# ---- Laws of loss against size


SIZES = (1e5, 2.2e5, 4e5)
KNOWN = {"first": (1.5, 0.30), "second": (1.7, 0.25), "third": (1.6, 0.40)}


def law_losses(floor=1.4, noise=0.0):
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


@pytest.mark.parametrize(("floor", "given"), [(0.4, None), (1.4, None), (2.5, None), (1.4, 1.4)])
def test_known_laws_are_found(floor, given):
    laws = results_laws.fit_laws(law_losses(floor), given)
    assert list(laws.floors.values()) == pytest.approx([floor] * 5, abs=1e-3)
    for row, (scale, exponent) in KNOWN.items():
        assert laws.rows[row].scale.mean == pytest.approx(scale, abs=1e-3)
        assert laws.rows[row].exponent.mean == pytest.approx(exponent, abs=1e-3)
    noisy = results_laws.fit_laws(law_losses(floor, noise=1e-3), given)
    for row, (_, exponent) in KNOWN.items():
        assert noisy.rows[row].exponent.low < exponent < noisy.rows[row].exponent.high


def test_laws_need_three_sizes_and_a_finite_loss_of_every_row_and_seed():
    losses = law_losses()
    two = {row: {size: of_row[size] for size in SIZES[:2]} for row, of_row in losses.items()}
    diverged, missing = law_losses(), law_losses()
    diverged["second"][SIZES[1]][4] = math.inf
    del missing["second"][SIZES[1]][4]
    for given, fragment in ((two, "2 sizes"), (diverged, "row second"), (missing, "row second")):
        with pytest.raises(ValueError, match=fragment):
            results_laws.fit_laws(given)


def test_a_distance_that_grows_by_a_tenth_per_doubling():
    sizes = (1e5, 2e5, 4e5)
    distances = {
        size: {seed: 0.1 * place + 0.01 * seed for seed in range(3)}
        for place, size in enumerate(sizes)
    }
    slope = results_laws.per_doubling(distances)
    assert slope.mean == pytest.approx(0.1)
    assert not slope.holds_zero


def test_every_seed_has_a_point_in_a_picture(folder):
    import plot_results

    of = results_data.read_comparison(folder, "rank_16_gentler")
    (axes,) = plot_results.draw_seeds(of).axes
    for row, points, middle in zip(of.rows, axes.lines[::2], axes.lines[1::2], strict=True):
        losses = list(of.losses(row).values())
        assert list(points.get_xdata()) == losses
        assert float(middle.get_xdata()[0]) == pytest.approx(mean(losses))
