"""Pages of results: every number from our runs is computed from the CSV files of docs/results."""

import csv
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest
import results_data
import results_page
import results_tables
from jinja2 import UndefinedError
from scipy import stats
from support.made_up_runs import made_up_distance, made_up_loss, remove_claims, write_runs

from switchtitan.errors import ConfigError

PAGES = {page: page.read_text() for page in results_page.PAGES.values()}
PAGE = PAGES[results_page.RESULTS]
ONE_RATE = results_page.PAGES["RESULTS_ONE_RATE.md.jinja"]
README = (results_page.ROOT / "README.md").read_text()
INTERVAL = re.compile(r"[+-]?\d[\d.]*(?: %)? \([^)]* to [^)]*\)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the template and the CSV files."""
    return Path(shutil.copytree(results_page.FOLDER, tmp_path / "results"))


def change_losses(file: Path, row: str, by: float) -> None:
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line in lines:
        if line["row"] == row:
            line["test_loss"] = str(float(line["test_loss"]) + by)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def test_the_pages_are_what_the_files_give():
    assert results_page.results_pages() == PAGES


def test_every_csv_file_is_behind_the_pages():
    files = {file.name for file in results_page.FOLDER.glob("*.csv")}
    assert files
    provenance = PAGES[results_page.FOLDER / "README.md"]
    assert all(f"[{name}]({name})" in provenance for name in files)


def test_a_p_value_below_the_last_digit_is_no_zero():
    pairs = results_data.read_comparison(results_page.FOLDER, "switching_python").pairs(
        [
            ("switchlora-gentle-muon-r16", "lora-balanced-r16"),
            ("switchlora-gentle-r16", "lora-balanced-r16"),
        ]
    )
    small, large = (results_tables.p_value(pair) for pair in pairs)
    assert pairs[0].adjusted_p < 0.001 < pairs[1].adjusted_p
    assert small == "p < 0.001"
    assert large == f"p {pairs[1].adjusted_p:.3f}"


def test_another_loss_gives_another_page(folder):
    change_losses(folder / "rank_16.csv", "galore-r16", 0.01)
    changed = results_page.results_pages(folder)[ONE_RATE]
    assert changed != PAGES[ONE_RATE]
    assert "GaLore | 0.01 | 3.109 | **+0.149" in changed


def test_a_sentence_that_the_losses_do_not_support_is_an_error(folder):
    change_losses(folder / "rank_16.csv", "apollo-r16", 0.1)
    with pytest.raises(ValueError, match="do not show: APOLLO is ahead; change the sentence"):
        results_page.results_pages(folder)


def test_differences_are_those_of_a_paired_t_test():
    losses: dict[str, list[float]] = {}
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
    assert f"SwitchLoRA | 0.02 | 2.914 | -0.046 ({low:+.3f} to {high:+.3f})" in PAGES[ONE_RATE]


def test_p_values_of_pairs_are_adjusted_over_the_pairs():
    of = results_data.read_comparison(results_page.FOLDER, "preset_python")
    pairs = [
        ("switchlora-gentle-r16", "lora-balanced-r16"),
        ("switchlora-gentle-muon-r16", "full_rank"),
    ]
    found = of.pairs(pairs)
    p_values = [
        stats.ttest_rel(*(list(of.losses(row).values()) for row in pair)).pvalue for pair in pairs
    ]
    assert [each.difference.p for each in found] == pytest.approx(p_values)
    assert p_values[0] > p_values[1]
    assert [each.adjusted_p for each in found] == pytest.approx([p_values[0], 2 * p_values[1]])


@pytest.mark.parametrize(
    "typed",
    [
        "a loss of 2.9602",
        "-0.0348 on test",
        "closes 92 % of the gap",
        "closes 92 to 95 % of it",
        "92 ± 19",
        "5.3 times LoRA's.",
        "from .5 on",
        "{{ 2.9602 }}",
        "{{ 92 }} %",
        "{{ '2.96' }}",
        "{% for x in ('a 2.96',) %}{{ x }}{% endfor %}",
        "{% if true %}2.96{% endif %}",
        "`0.1` and 0.2 and `0.3`",
    ],
)
def test_a_number_that_is_typed_by_hand_is_refused(folder, typed):
    template = folder / "RESULTS.md.jinja"
    template.write_text(template.read_text() + typed)
    assert results_page.typed_numbers(typed)
    with pytest.raises(ValueError, match="numbers that no expression computes"):
        results_page.results_pages(folder)


@pytest.mark.parametrize(
    "allowed",
    [
        "the ratio `0.1` of 5 frozen steps, seeds 2, 3 and 4",
        "```bash\nswitchtitan train --method.decay_ratio 0.1\n```",
        "torch 2.13.0 and [arXiv 2406.06564](https://arxiv.org/abs/2406.06564)",
        "{% call published() %}34.06, 5 % of it{% endcall %}",
        "{{ level }}, {{ number(x, 3) }}",
        "{{ keys.losses('switchlora-r16-decay-ratio-0.4') }}",
    ],
)
def test_values_of_keys_published_figures_and_expressions_are_no_typed_numbers(allowed):
    assert results_page.typed_numbers(allowed) == []


def test_an_unknown_name_is_an_error(folder):
    (folder / "RESULTS.md.jinja").write_text("{{ eigth }}")
    with pytest.raises(UndefinedError, match="eigth"):
        results_page.results_pages(folder)


def test_a_comparison_without_a_file_is_an_error(folder):
    (folder / "preset_python.csv").unlink()
    with pytest.raises(ValueError, match=r"preset_python.csv: every row has a run of 0 seed\(s\)"):
        results_page.results_pages(folder)


def test_a_seed_counts_once_every_row_has_a_run_of_it(folder):
    write_runs(folder, "one_rate_python", lambda run: made_up_loss(run, 0.1))
    header, *lines = write_runs(folder, "own_rate_python", lambda run: made_up_loss(run, 0.04))
    seeds = [int(line["seed"]) for line in csv.DictReader([header, *lines])]
    of_four = [line for line, seed in zip(lines, seeds, strict=True) if seed <= 4]
    of_five = [line for line, seed in zip(lines, seeds, strict=True) if seed == 5]
    (folder / "own_rate_python.csv").write_text("".join([header, *of_four, *of_five[:-1]]))
    one, own = (
        results_data.read_comparison(folder, name)
        for name in ("one_rate_python", "own_rate_python")
    )
    assert results_tables.seeds(own) == "2, 3 and 4"
    assert results_tables.missing(own) == " (not finished: 5 and 6)"
    assert results_tables.seeds(one) == "2, 3, 4, 5 and 6"
    assert results_tables.missing(one) == ""
    assert {of.change.difference.num for of in results_data.changes(one, own)} == {3}
    assert {of.before.num for of in results_data.changes(one, own)} == {3}

    of_three = [line for line, seed in zip(lines, seeds, strict=True) if seed <= 3]
    (folder / "own_rate_python.csv").write_text("".join([header, *of_three, *of_five[:-1]]))
    with pytest.raises(ValueError, match=r"own_rate_python.csv: every row has a run of 2 seed"):
        results_data.read_comparison(folder, "own_rate_python")


def test_missing_seeds_are_named_on_the_page(folder):
    remove_claims(folder)
    lines = write_runs(folder, "same_rates_python", lambda run: made_up_loss(run, 0.1))
    column = lines[0].split(",").index("seed")
    before = results_page.results_pages(folder)[results_page.RESULTS]
    assert "same_rates_python.toml) is declared with more seeds" not in before
    kept = [line for line in lines if line.split(",")[column] != "11"]
    (folder / "same_rates_python.csv").write_text("".join(kept))
    after = results_page.results_pages(folder)[results_page.RESULTS]
    said = "same_rates_python.toml) is declared with more seeds (not finished: 11)."
    assert said in " ".join(after.split())


def test_the_change_of_a_distance_is_a_paired_t_test(folder):
    for name, distance in (("one_rate", 0.1), ("own_rate", 0.04)):
        write_runs(folder, f"{name}_python", lambda run, d=distance: made_up_loss(run, d))
    one = results_data.read_comparison(folder, "one_rate_python")
    own = results_data.read_comparison(folder, "own_rate_python")
    changed = results_data.changes(one, own)
    found = {of.title: of for of in changed}
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
    table = results_tables.changes_table({"Python": changed, "again": changed}).splitlines()
    assert table[0] == "|  | Python | again |"
    change = f"**{results_tables.interval(lora.change)}**"
    assert f"| LoRA | {change} | {change} |" in table


def test_the_overview_has_the_best_row_first_and_distances_to_the_same_seeds(folder):
    """Distances of rows of other comparisons are to full rank's runs of the seeds they share."""
    distances = {"preset_python": 0.1, "optimizers_python": 0.05, "cola_python": 0.3}
    distances |= {"own_rate_english": 0.2, "preset_english": 0.4}
    of = {}
    for name, distance in distances.items():
        # Full rank's loss differs by 0.5 between the first two.
        shift = 0.5 if name == "optimizers_python" else 0.0
        write_runs(folder, name, lambda run, d=distance, s=shift: made_up_loss(run, d) + s)
        of[name] = results_data.read_comparison(folder, name)
    preset, today, cola, english, newer = of.values()
    rows = {
        "full": (preset, "full_rank", preset),
        "gentle": (preset, "switchlora-gentle-r16", preset),
        "Muon": (today, "muon", today),
        "Muon, other base": (today, "muon", preset),
        "control": (preset, "lora-balanced-r16", preset),
        "CoLA": (cola, "cola-r16", cola),
    }
    _, _, *lines = results_tables.overview_table(rows, [english, newer]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells][:2] == ["full", "Muon"]
    found = {row[0]: row[4:] for row in cells}
    assert found["full"] == ["-", "-"]
    for title, row, distance, shift in (
        ("gentle", "switchlora-gentle-r16", 0.1, 0),
        ("Muon", "muon", 0.05, 0),
        ("Muon, other base", "muon", 0.05, 0.5),
    ):
        expected = mean(made_up_distance(seed, row, distance) for seed in preset.seeds) + shift
        assert float(found[title][0].split()[0]) == pytest.approx(expected, abs=5e-4)
    assert found["CoLA"][1] == ""
    # The first comparison with the row counts.
    for title, row, distance in (("control", "lora-balanced-r16", 0.2), ("Muon", "muon", 0.4)):
        expected = mean(made_up_distance(seed, row, distance) for seed in english.seeds)
        assert float(found[title][1].split()[0]) == pytest.approx(expected, abs=5e-4)
    ranks = {row[0]: row[3] for row in cells}
    assert ranks["CoLA"] == "-", "its layers have no dense weight"
    assert ranks["gentle"] == f"{50 + mean(preset.seeds):.1f}"


def test_rows_with_the_same_budget_have_their_own_tokens(folder):
    heading = "## What do rows reach with the same time, bytes or state?"
    remove_claims(folder)
    write_runs(folder, "budgets_python", lambda run: made_up_loss(run, -0.1 * ("826" in run.row)))
    section = (
        results_page.results_pages(folder)[results_page.RESULTS]
        .partition(heading)[2]
        .partition("\n## ")[0]
    )
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert len(lines) == 12, "full rank, and each of the nine other rows once"
    tokens = {title.removeprefix("| "): text for title, _, text, *_ in lines[2:]}
    assert tokens["full rank"] == tokens["full rank, hidden 100"] == "2.05 M"
    assert tokens["full rank, Muon, 826 steps"] == "1.69 M"
    assert tokens["W = B A, 2060 steps"] == "4.22 M"
    bold = [line for line in lines if "**" in line[-1]]
    assert [line[0] for line in bold] == ["| full rank, Muon, 826 steps"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- one two\n  three\n- four\n", "- one two three\n- four\n"),
        ("    - one two three four five six\n", "    - one two three\n      four five six\n"),
        ("# a heading that is long and stays\n\ntext\n", None),
        ("| a | table | that | is | long |\n| --- |\n", None),
        ("![a picture with a long text](x.png)\n", None),
        ("```bash\na command that is long and stays\nsecond\n```\n", None),
        ("differs by +0.1 (+0.0 to +0.2) here\n", "differs by\n+0.1 (+0.0 to +0.2)\nhere\n"),
        ("is set with `key = 1` in it now\n", "is set with `key = 1`\nin it now\n"),
        ("ends in\n-0.1 and continues\n", "ends in -0.1 and\ncontinues\n"),
    ],
)
def test_text_is_wrapped_and_what_has_lines_of_its_own_is_not(monkeypatch, text, expected):
    monkeypatch.setattr(results_page, "_WIDTH", 22)
    assert results_page.wrapped(text) == (text if expected is None else expected)


def test_a_row_reported_with_different_rates_is_an_error(folder):
    file = folder / "rank_32.csv"
    file.write_text(file.read_text().replace("report,lora-r32,0.02,3", "report,lora-r32,0.01,3"))
    of = results_data.read_comparison(folder, "rank_32")
    with pytest.raises(ValueError, match="lora-r32 is reported with different values"):
        of.chosen("lora-r32")


def test_a_best_rate_at_the_end_of_its_grid_is_marked(folder):
    file = folder / "rank_32.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(s for s in lines if not s.startswith("selection,lora-r32,0.04")))
    of = results_data.read_comparison(folder, "rank_32")
    assert "| LoRA | 0.02 (edge) |" in results_tables.results_table(of)
    whole = results_data.read_comparison(results_page.FOLDER, "rank_32")
    assert "(edge)" not in results_tables.results_table(whole)


def test_a_line_that_is_no_run_is_an_error(folder):
    file = folder / "rank_32.csv"
    file.write_text(file.read_text() + "report,lora-r32\n")
    with pytest.raises(ValueError, match=r"rank_32.csv, line 54"):
        results_data.read_comparison(folder, "rank_32")
    lines = write_runs(folder, "own_rate_python", lambda run: made_up_loss(run, 0.1))
    (folder / "own_rate_python.csv").write_text(lines[0] + lines[1].replace(",False,", ",maybe,"))
    with pytest.raises(ConfigError, match="line 2: diverged"):
        results_data.read_comparison(folder, "own_rate_python")


def test_two_results_of_one_run_are_an_error(folder):
    change_losses(folder / "rank_32.csv", "full_rank", 0.01)
    with pytest.raises(ValueError, match=r"full_rank.*keep one"):
        results_data.read_comparison(folder, "rank_16", "rank_32")


def test_a_diverged_run_is_no_number(folder):
    lines = write_runs(folder, "one_rate_python", lambda run: made_up_loss(run, 0.1))
    diverged = [
        re.sub(r",False,(\d+,\d+),[\d.]+,[\d.]+,", r",True,\1,,,", line)
        if ",lora-r16," in line and "report,lora-r16" in line else line
        for line in lines
    ]  # fmt: skip
    assert diverged != lines
    (folder / "one_rate_python.csv").write_text("".join(diverged))
    of = results_data.read_comparison(folder, "one_rate_python")
    (line,) = [s for s in results_tables.results_table(of).splitlines() if "| LoRA |" in s]
    assert line.endswith("| diverged | diverged | diverged |")


def readme_results(readme: str) -> str:
    return readme.partition("## Results")[2].partition("\n## ")[0]


def missing_from_page(section: str) -> list[str]:
    """The numbers and intervals of a section that docs/RESULTS.md does not have."""
    typed = [re.split(r"[ ,;)|]", text)[0] for text in results_page.typed_numbers(section)]
    return [text for text in [*INTERVAL.findall(section), *typed] if text not in PAGE]


def test_the_readme_quotes_the_page():
    section = readme_results(README)
    assert len(INTERVAL.findall(section)) > 10
    assert missing_from_page(section) == []
    assert missing_from_page(section.replace("+0.153 (", "+0.154 (", 1)) != []
    assert missing_from_page(section + "closes 92 ± 19.1 % of it") != []
