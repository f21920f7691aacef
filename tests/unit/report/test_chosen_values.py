"""The choice of several keys in the report of a comparison: a chart for each one in turn."""

from typing import Any

from switchtitan.report.chosen_values import chosen_cell, selection_section
from switchtitan.report.comparison_files import Row

LR, DECAY = "optimizer.lr", "optimizer.weight_decay"
UNKNOWN = dict.fromkeys(
    (
        "loss", "perplexity", "validation_bits_per_byte", "test_bits_per_byte", "validation_loss",
        "difference", "adjusted_p", "verdict", "effective_rank", "num_trainable", "state_gib",
        "peak_gib", "tokens_per_s", "measured",
    )
)  # fmt: skip


def row(name: str, tried: list[dict[str, Any]], values: dict[str, float]) -> Row:
    contents = {"name": name, "title": name, "values": values, "tried": tried, "num_diverged": 0}
    return Row.model_validate(UNKNOWN | contents)


def tried(key: str, place: int, losses: dict[float, float | None], edge: bool | None) -> dict:
    return {"key": key, "place": place, "losses": losses, "is_interior": edge}


ROWS = [
    row(
        "dense",
        [
            tried(LR, 0, {2e-3: 3.0, 1e-3: 3.1, 4e-3: None}, True),
            tried(DECAY, 1, {0.0: 3.0, 0.1: 2.9}, None),
            tried(LR, 2, {2e-3: 2.9, 4e-3: 2.8, 1e-3: 3.0}, False),
        ],
        {LR: 4e-3, DECAY: 0.1},
    ),
    row("thin", [tried(LR, 0, {1e-2: 3.3, 2e-2: 3.2, 4e-2: 3.4}, True)], {LR: 2e-2}),
    row("ablation", [], {LR: 2e-2}),
]


def test_each_key_in_turn_has_a_chart_with_the_rows_that_tune_it():
    section = selection_section(ROWS)
    assert section is not None
    charts = section["charts"]
    assert [chart["title"] for chart in charts] == [
        "Validation loss by lr",
        "Validation loss by weight_decay",
        "Validation loss by lr",
    ]
    assert [set(chart["curves"]) for chart in charts] == [{"0", "1"}, {"0"}, {"0"}]
    # Weight decay may be 0, which has no place on a logarithmic axis.
    assert [chart["isLogAcross"] for chart in charts] == [True, False, True]
    assert charts[0]["curves"]["0"]["x"] == [1e-3, 2e-3, 4e-3]
    assert len({chart["metric"] for chart in charts}) == 3


def test_without_runs_there_is_nothing_to_show():
    assert selection_section([ROWS[2]]) is None
    assert selection_section([row("new", [tried(LR, 0, {}, None)], {})]) is None


def test_a_chosen_value_at_the_edge_of_its_grid_is_marked():
    # The last time that the learning rate was tried counts.
    assert chosen_cell(ROWS[0], LR)["text"] == "0.004 (edge)"
    assert chosen_cell(ROWS[0], DECAY)["text"] == "0.1"
    assert chosen_cell(ROWS[1], LR)["text"] == "0.02"
    assert chosen_cell(ROWS[1], DECAY)["text"] == "–"
