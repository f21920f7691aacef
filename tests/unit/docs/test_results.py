"""What scripts/results.py writes into pages, computed by hand."""

import math

import pytest
import results

COLUMNS = "row,seed,tokens,test_loss,validation_loss"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def write_runs(folder, file, rows, tokens=400):
    """Writes runs with these test losses by row and seed; validation losses are higher by 1."""
    lines = [
        f"{row},{seed},{tokens},{loss},{loss + 1}"
        for row, losses in rows.items()
        for seed, loss in losses.items()
    ]
    (folder / f"{file}.csv").write_text("\n".join([COLUMNS, *lines]))


# Seed 1 chose values. a - b is 0.1, 0.2 and 0.3: mean 0.2, standard deviation 0.1. With t = 4.3027
# of 2 degrees of freedom, half of the interval is 4.3027 * 0.1 / sqrt(3) = 0.2484.
BY_HAND = {
    "a": {1: 9.0, 2: 3.0, 3: 3.2, 4: 3.4},
    "b": {1: 0.0, 2: 2.9, 3: 3.0, 4: 3.1},
    "c": {2: 1.0, 3: 1.1, 4: 1.2},
    "d": {2: 1.4, 3: 1.4, 4: 1.4},
    "one": {2: 2.5},
}
FORMULAS = {
    "hand: a": "3.200",
    "hand: a, validation": "4.200",
    "hand: a - b": "+0.200 (-0.048 to +0.448)",
    "hand: b - a, validation": "-0.200 (-0.448 to +0.048)",
    "hand: a - b - c + d": "+0.500 (+0.500 to +0.500)",
    "hand: a - one": "+0.500 (one seed)",
    "other: x - hand/a": "+1.000 (+1.000 to +1.000)",
}


def test_numbers_are_those_computed_by_hand(folder):
    write_runs(folder, "hand", BY_HAND)
    write_runs(folder, "other", {"x": {2: 4.0, 3: 4.2, 4: 4.4, 5: 99.0}})
    zeros = {"3": "0.000", "4": "0.000", "+": "+0.000 (one seed)", "-": "+0.000 (one seed)"}
    old = "".join(f"{zeros[value[0]]}<!-- {of} -->\n" for of, value in FORMULAS.items())
    expected = "".join(f"{value}<!-- {of} -->\n" for of, value in FORMULAS.items())
    assert results.with_results(old) == results.with_results(expected) == expected


def test_the_share_of_tokens_is_interpolated_in_their_logarithm(folder):
    """100 tokens have loss 3, 400 have 2: so 200 have the loss 2.5 of a row of 250."""
    rows = {100: 3.0, 400: 2.0}
    lines = [f"t{n},{s},{n},{loss + s},0" for n, loss in rows.items() for s in (2, 3)]
    (folder / "budgets.csv").write_text("\n".join([COLUMNS, *lines]))
    write_runs(folder, "reached", {"a": {2: 4.5, 3: 5.5}, "low": {2: 3.9, 3: 5.5}}, tokens=250)
    formula = "0.00 (0.00 to 0.00)<!-- budgets: reached/{}, tokens -->"
    assert results.with_results(formula.format("a")).startswith("0.80 (0.80 to 0.80)<!--")
    with pytest.raises(ValueError, match="low"):
        results.with_results(formula.format("low"))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("3<!-- wrong: a -->", "a number of its form"),
        ("3.000<!-- wrong: absent -->", "row absent"),
        ("3.000<!-- wrong: selected -->", "row selected"),
        ("+0.000 (one seed)<!-- wrong: a - b -->", "no seed"),
        ("3.000<!-- wrong: twice -->", "several runs of a seed"),
    ],
)
def test_a_number_that_cannot_be_computed_is_refused(folder, text, fragment):
    write_runs(
        folder, "wrong", {"a": {2: 3.0}, "b": {3: 3.0}, "selected": {1: 3.0}, "twice": {2: 1.0}}
    )
    with (folder / "wrong.csv").open("a") as file:
        file.write("\ntwice,2,400,1.0,2.0\n")
    with pytest.raises(ValueError, match=fragment):
        results.with_results(text)


DIVERGED = ("diverged,1,9,0.002,2.1", "diverged,1,9,0.004,2.0", "diverged,1,inf,0.008,inf")


def test_the_best_rate_is_the_vertex_of_a_parabola_over_its_logarithm(folder):
    """Losses 2 + log2(rate / 0.003)^2 / 10, lowest at an end, or with a neighbour that diverged."""
    rates = (0.001, 0.002, 0.004, 0.008)
    curves = {"inside": 0.003, "low": 0.0005, "high": 0.05}
    lines = [
        f"{row},1,9,{rate},{2 + 0.1 * math.log2(rate / best) ** 2}"
        for row, best in curves.items()
        for rate in rates
    ]
    head = "row,seed,test_loss,optimizer.lr,validation_loss"
    (folder / "tried.csv").write_text("\n".join([head, *lines, *DIVERGED, "inside,2,1,0.002,0"]))
    forms = [f"0.0000<!-- tried: {row}, rate -->" for row in (*curves, "diverged")]
    found = results.with_results("\n".join(forms))
    for value in ("0.0030<", "0.0010 or less<", "0.0080 or more<", "0.0040<"):
        assert value in found
    assert results.with_results(found) == found
    at = "+0.000 (one seed)<!-- tried: high@8e-3 - inside@4e-3, validation -->"
    gap = 0.1 * (math.log2(0.008 / 0.05) ** 2 - math.log2(0.004 / 0.003) ** 2)
    assert results.with_results(at).startswith(f"{gap:+.3f} (one seed)<")
