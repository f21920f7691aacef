"""A report in a real browser, opened from the disk: looked at, dragged, hovered and clicked."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Page, headless_browser
from support.commands import run
from support.reported import (
    NUM_STEPS,
    finish_comparison,
    losses_at,
    results,
    write_grid,
    write_run,
)

LOSS = "[data-metric='loss/train']"
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26
"""Margins of a plot in pixels; see page/chart.js."""
FINALS = {"dense": 3.0, "thin": 3.2}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with headless_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, final, rank=8) for name, final in FINALS.items()]
    output = folder / "report.html"
    assert run("report", *runs, "--output", output).status == 0
    return output


@pytest.fixture
def page(browser: Page, report: Path) -> Iterator[Page]:
    """The report of two runs; its code must raise no error, and nothing else may be loaded."""
    browser.use_theme("light")
    browser.open(report)
    yield browser
    assert browser.errors == []
    assert browser.requests == [report.resolve().as_uri()]


def across_ticks(page: Page, chart: str = LOSS) -> list[float]:
    return [float(text) for text in page.texts(f"{chart} .tick.across")]


def place_of(page: Page, step: int, chart: str = LOSS) -> tuple[float, float]:
    """The pixel of a step of the unzoomed chart."""
    left, top, width, height = page.box(f"{chart} .plot")
    share = (step - 1) / (NUM_STEPS - 1)
    return left + LEFT + share * (width - LEFT - RIGHT), top + TOP + 0.5 * (height - TOP - BOTTOM)


def tooltip(page: Page) -> list[str]:
    return page.texts(f"{LOSS} .tooltip:not([hidden]) p, {LOSS} .tooltip:not([hidden]) td")


def test_the_table_has_the_numbers_of_the_results(page: Page) -> None:
    titles = page.texts("#summary thead th")
    lines = [
        page.texts(f"#summary tbody tr:nth-child({line}) > *") for line in range(1, len(FINALS) + 1)
    ]
    for line, (name, final) in zip(lines, FINALS.items(), strict=True):
        cells, expected = dict(zip(titles, line, strict=True)), results(final)
        assert cells["run"] == name
        assert cells["final val. loss"] == f"{expected['loss/validation']:.4f}"
        assert cells["test loss"] == f"{expected['loss/test']:.4f}"
        assert cells["steps"] == str(expected["step"])
        assert cells["dtype"] == "float32"


def test_a_click_on_a_column_sorts_the_table(page: Page) -> None:
    assert page.texts("#summary tbody th") == ["dense", "thin"]
    titles = page.texts("#summary thead th")
    column = f"#summary thead th:nth-child({titles.index('test loss') + 1})"
    for expected in (["dense", "thin"], ["thin", "dense"]):
        left, top, _, height = page.box(f"{column} button")
        page.click((left + 3, top + height / 2))
        assert page.texts("#summary tbody th") == expected


def test_hover_shows_the_values_of_all_runs_at_the_nearest_step(page: Page) -> None:
    assert tooltip(page) == []
    for step in (7, 31):
        page.move(place_of(page, step))
        heading, *cells = tooltip(page)
        assert heading == f"step {step}"
        shown = [float(text) for text in cells[::2]]
        expected = [losses_at(step, final)["loss/train"] for final in FINALS.values()]
        # Shown with five digits.
        assert shown == pytest.approx(expected, rel=1e-4)
    page.move((2, 2))
    assert tooltip(page) == []


def test_a_drag_zooms_all_charts_and_a_double_click_resets_them(page: Page) -> None:
    before = {chart: across_ticks(page, chart) for chart in (LOSS, "[data-metric='optimizer/lr']")}
    page.drag(place_of(page, 20), place_of(page, 30))
    for chart, ticks in before.items():
        zoomed = across_ticks(page, chart)
        assert zoomed != ticks
        assert 20 <= min(zoomed) <= max(zoomed) <= 30
    left, top, *_ = page.box(f"{LOSS} .plot")
    page.click((left + 200, top + 80), num_clicks=2)
    assert {chart: across_ticks(page, chart) for chart in before} == before


def test_a_tall_drag_zooms_both_axes_and_the_button_resets_them(page: Page) -> None:
    before = page.texts(f"{LOSS} .tick.up")
    assert page.value("document.getElementById('reset').disabled")
    x, y = place_of(page, 20)
    page.drag((x, y - 30), (x + 60, y + 30))
    assert page.texts(f"{LOSS} .tick.up") != before
    left, top, width, height = page.box("#reset")
    page.click((left + width / 2, top + height / 2))
    assert page.texts(f"{LOSS} .tick.up") == before
    assert page.value("document.getElementById('reset').disabled")


def test_a_click_without_a_drag_does_not_zoom(page: Page) -> None:
    before = across_ticks(page)
    page.click(place_of(page, 20))
    assert across_ticks(page) == before


def test_the_legend_hides_and_isolates_runs(page: Page) -> None:
    def shown() -> set[str]:
        return set(page.value(f"[...document.querySelectorAll(\"{LOSS} [data-series]\")]"
                              ".map((node) => node.dataset.series)"))  # fmt: skip

    assert shown() == {"0", "1"}
    left, top, width, height = page.box(".chip")
    chip = (left + width / 2, top + height / 2)
    page.click(chip)
    assert shown() == {"1"}
    assert page.value("document.querySelector('.chip').getAttribute('aria-pressed')") == "false"
    page.click(chip)
    assert shown() == {"0", "1"}
    page.click(chip, modifiers=8)  # Shift
    assert shown() == {"0"}
    page.click(chip, modifiers=8)
    assert shown() == {"0", "1"}


def test_smoothing_is_the_moving_average(page: Page) -> None:
    page.value(
        "(() => { const slider = document.getElementById('smoothing'); slider.value = 0.9;"
        "slider.dispatchEvent(new Event('input')); })()"
    )
    page.settle()
    page.move(place_of(page, 40))
    heading, smoothed, raw, *_ = tooltip(page)
    assert heading == "step 40"
    mean = total = 0.0
    for step in range(1, 41):
        mean = 0.9 * mean + 0.1 * losses_at(step, FINALS["dense"])["loss/train"]
        total = 0.9 * total + 0.1
    assert float(smoothed) == pytest.approx(mean / total, rel=1e-4)
    assert float(raw.removeprefix("raw ")) == pytest.approx(
        losses_at(40, FINALS["dense"])["loss/train"], rel=1e-4
    )


def test_a_logarithmic_axis_has_equal_distances_for_equal_ratios(page: Page) -> None:
    left, top, width, height = page.box(f"{LOSS} .actions button")
    page.click((left + width / 2, top + height / 2))
    read = (
        f'[...document.querySelectorAll("{LOSS} .tick.up")]'
        ".map((node) => [Number(node.textContent), Number(node.getAttribute('y'))])"
    )
    (low, low_y), (middle, middle_y), *_, (high, high_y) = page.value(read)
    slope = (low_y - high_y) / math.log(high / low)
    # Places are rounded to a tenth of a pixel.
    assert low_y - middle_y == pytest.approx(slope * math.log(middle / low), abs=0.3)
    assert slope > 0


def test_the_axis_can_count_tokens(page: Page) -> None:
    page.value(
        "(() => { const choice = document.getElementById('across'); choice.value = 'tokens';"
        "choice.dispatchEvent(new Event('change')); })()"
    )
    page.settle()
    page.move(place_of(page, 10))
    assert tooltip(page)[0] == "tokens 1280"


def test_arrow_keys_move_from_step_to_step(page: Page) -> None:
    page.value(f'document.querySelector("{LOSS} .plot").focus()')
    for step in (1, 2, 3):
        for kind in ("rawKeyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
        assert tooltip(page)[0] == f"step {step}"


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page, report: Path) -> None:
    page.open(report, 390, 844, is_phone=True)
    assert page.value("document.documentElement.scrollWidth") <= 390
    assert len(page.texts(f"{LOSS} .tick.across")) >= 3
    assert page.value(f'document.querySelector("{LOSS} .plot").clientWidth') > 300


def test_both_themes_have_readable_text(page: Page, report: Path) -> None:
    contrasts = {}
    for theme in ("light", "dark"):
        page.use_theme(theme)
        page.open(report)
        colours = page.value(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body)"
            ".backgroundColor, getComputedStyle(document.querySelector('.muted')).color]"
        )
        text, back, muted = map(luminance, colours)
        contrasts[theme] = (contrast(text, back), contrast(muted, back))
        assert (back > 0.5) == (theme == "light")
    # 4.5 is the least contrast of normal text in WCAG 2.2, success criterion 1.4.3.
    assert min(min(pair) for pair in contrasts.values()) >= 4.5, contrasts


def luminance(colour: str) -> float:
    """The relative luminance of `rgb(...)`, as WCAG defines it."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_hostile_name_runs_nothing(browser: Page, tmp_path: Path) -> None:
    hostile = "img src=x onerror=alert(1)><script>document.title='taken'<"
    folder = write_run(tmp_path / "<" / f"script>< {hostile}")
    config = '[method]\nname = "</script><script>document.title=1</script>"\n'
    (folder / "config.toml").write_text(config)
    output = tmp_path / "report.html"
    assert run("report", folder, "--output", output).status == 0
    browser.open(output)
    assert browser.value("document.title") == f"script>< {hostile} - switchtitan"
    assert browser.value("document.querySelectorAll('img, script').length") == 2
    assert browser.texts("h1") == [f"script>< {hostile}"]
    assert browser.errors == []
    assert browser.requests == [output.as_uri()]


def test_the_browser_reports_errors_and_requests(browser: Page, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<img src='http://127.0.0.1:9/x.png'><script>missing()</script>")
    browser.open(file)
    assert any("missing is not defined" in error for error in browser.errors)
    assert "http://127.0.0.1:9/x.png" in browser.requests


def test_a_comparison_is_shown_by_row(browser: Page, tmp_path: Path) -> None:
    folder = finish_comparison(write_grid(tmp_path))
    output = tmp_path / "report.html"
    assert run("report", folder, "--output", output).status == 0
    browser.open(output)
    assert browser.texts("#results > .table tbody th") == ["dense", "thin", "thin-balanced"]
    assert browser.texts("#results .intervals h3") == [
        "Test loss",
        "Test loss minus that of dense, seed by seed",
    ]
    left, top, width, _ = browser.box(f"{LOSS} .plot")
    browser.move((left + width / 2, top + 80))
    heading, *cells = tooltip(browser)
    assert heading.startswith("step ")
    assert all(note.startswith("± ") for note in cells[1::2])
    assert browser.errors == []
    assert browser.requests == [output.as_uri()]
