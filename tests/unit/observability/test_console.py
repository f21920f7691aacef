import math

import pytest

from switchtitan.observability.console import (
    CONSOLE_WIDTH,
    ConsoleTable,
    format_count,
    format_duration,
    format_summary,
)

LARGE = {
    "loss/train": 999.123456,
    "loss/validation": 12.3456,
    "perplexity/validation": 229123.4,
    "optimizer/lr": 2.123e-02,
    "optimizer/grad_norm": 12345.6,
    "throughput/tokens_per_s": 123.4e6,
    "throughput/tflop_per_s_per_device": 1307.4,
    "throughput/mfu": 1.0,
    "memory/peak_gib": 139.8,
    "throughput/eta_s": 99 * 86400 + 23 * 3600,
    "switch/vectors_switched": 12.0,
}


@pytest.mark.parametrize("num_steps", [7, 40_000, 1_000_000])
def test_every_line_fits_the_console_and_columns_line_up(num_steps):
    table = ConsoleTable(num_steps)
    lines = table.lines(num_steps, LARGE)
    assert len(lines) == 3
    assert all(len(line) <= CONSOLE_WIDTH for line in lines)
    header, row, _ = lines
    assert len(header) == len(row) == len(table.lines(1, LARGE)[0])


def test_row_shows_the_reported_values():
    header, row = ConsoleTable(40_000).lines(
        1000,
        {
            "loss/train": 3.14159,
            "optimizer/lr": 0.02,
            "throughput/tokens_per_s": 12_345.0,
            "throughput/tflop_per_s_per_device": 0.5,
            "throughput/mfu": 0.4123,
            "throughput/eta_s": 11_220.0,
        },
    )
    assert header.split() == ["step", "loss", "lr", "tokens/s", "TFLOP/s", "MFU", "ETA"]
    assert row.split() == ["1000/40000", "3.1416", "2.00e-02", "12.3k", "0.500", "41.2%", "3h07m"]


def test_a_row_without_speed_and_time_left_has_the_same_columns():
    table = ConsoleTable(100)
    measured = {
        "throughput/tokens_per_s": 700.0,
        "throughput/tflop_per_s_per_device": 0.5,
        "throughput/eta_s": 90.0,
    }
    lines = table.lines(1, {"loss/train": 8.0}) + table.lines(10, {"loss/train": 7.0} | measured)
    assert [line.split() for line in lines] == [
        ["step", "loss", "tokens/s", "TFLOP/s", "ETA"],
        ["1/100", "8.0000", "-", "-", "-"],
        ["10/100", "7.0000", "700", "0.500", "1m30s"],
    ]


def test_validation_has_a_separate_line():
    lines = ConsoleTable(300).lines(
        20, {"loss/validation": math.log(20), "perplexity/validation": 20.0}
    )
    assert lines == [" 20/300 validation loss 2.9957, perplexity 20.00"]


def test_header_repeats_after_some_rows_and_when_columns_change():
    table = ConsoleTable(100, header_interval=3)
    values = {"loss/train": 1.0}
    assert [len(table.lines(step, values)) for step in range(1, 8)] == [2, 1, 1, 2, 1, 1, 2]
    assert len(table.lines(8, values | {"memory/peak_gib": 1.0})) == 2


def test_non_finite_values_are_shown():
    _, row = ConsoleTable(100).lines(
        1, {"loss/train": math.nan, "optimizer/grad_norm": math.inf, "throughput/eta_s": math.inf}
    )
    assert row.split() == ["1/100", "nan", "inf", "-", "-", "?"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05, "0.05"),
        (7, "7"),
        (999.4, "999"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (45.6e6, "45.6M"),
        (1e17, "1e+05T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (7500, "2h05m"),
        (4 * 86400 + 11 * 3600, "4d11h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert format_duration(seconds) == text


def test_summary_aligns_values_between_rules():
    lines = format_summary([("a", "1"), ("longer", "2")])
    assert lines[1:3] == ["a       1", "longer  2"]
    assert lines[0] == lines[-1] == "-" * CONSOLE_WIDTH
