"""`scripts/reliability_report.py`: tables hold what fault tests recorded, and nothing else."""

import json

import pytest
import reliability_report
from support.fault_report import record


def recorded(folder, monkeypatch, *facts):
    file = folder / "faults.jsonl"
    monkeypatch.setenv("SWITCHTITAN_FAULTS_REPORT", str(file))
    for fact in facts:
        record(**fact)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_nothing_is_recorded_without_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("SWITCHTITAN_FAULTS_REPORT", raising=False)
    monkeypatch.chdir(tmp_path)
    record("kills", phase="save", kills=1)
    assert not list(tmp_path.iterdir())


def test_counts_are_summed_by_their_labels_and_the_greatest_measurement_is_kept(
    tmp_path, monkeypatch
):
    lines = recorded(
        tmp_path,
        monkeypatch,
        {"fault": "kills", "phase": "save", "num_ranks": 1, "kills": 3},
        {"fault": "kills", "phase": "save", "num_ranks": 2, "kills": 4},
        {"fault": "kills", "phase": "save", "num_ranks": 1, "kills": 5},
        {"fault": "soak", "quantity": "memory", "slope": 0.25},
        {"fault": "soak", "quantity": "memory", "slope": 0.125},
    )
    sums = reliability_report.sums_of(lines)
    assert sums["faults"] == {
        "kills": [
            {"phase": "save", "num_ranks": 1, "kills": 8},
            {"phase": "save", "num_ranks": 2, "kills": 4},
        ],
        "soak": [{"quantity": "memory", "slope": 0.25}],
    }
    assert sums["environment"].keys() == {"torch", "cpu", "commit", "form"}


def test_tables_are_made_from_the_sums(tmp_path):
    file = tmp_path / "faults.json"
    tests = [
        {"file": "test_a", "test": "test_one_thing", "passed": 2, "failed": 0, "seconds": 1.5},
        {"file": "test_a", "test": "test_another", "passed": 1, "failed": 1, "seconds": 200.0},
        {"file": "test_b", "test": "test_other", "passed": 4, "failed": 0, "seconds": 2.0},
    ]
    kills = [
        {"phase": "save", "num_ranks": 1, "kills": 8},
        {"phase": "start-up", "num_ranks": 1, "kills": 4},
    ]
    environment = {"form": ["long"], "torch": ["2.13"], "cpu": ["AVX2"], "commit": ["abc", "def"]}
    file.write_text(
        json.dumps({"environment": environment, "faults": {"kills": kills, "tests": tests}})
    )
    names = ("kills", "tests", "tests/test_a", "stops")
    text = "".join(f"<!-- faults {name} -->\nold\n<!-- end -->\n" for name in names)
    written = reliability_report.with_tables(text, file)
    assert "| phase | ranks | kills |\n| --- | --- | ---: |\n| save | 1 | 8 |" in written
    assert "| all |  | 12 |" in written
    assert "| test_a | 3 | 1 | 202 |" in written
    assert "| one thing | 2 | 0 | 1.5 |" in written
    assert "Long form, torch 2.13, CPU capability AVX2:\n" in written
    assert "(measurements/faults.json), commit abc, def" in written
    assert "old" not in written
    _, _, stops = written.partition("<!-- faults stops -->")
    assert stops.strip().startswith(reliability_report.NOT_MEASURED.strip())
    assert reliability_report.with_tables(written, file) == written


def test_the_rounding_of_a_fit_is_zero():
    assert [reliability_report._cell(slope) for slope in (-3e-14, 2.5e-7, 1234.5)] == [
        "0",
        "2.5e-07",
        "1234",
    ]


def test_a_missing_file_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        reliability_report.main([str(tmp_path / "faults.jsonl")])
    assert "no such file" in capsys.readouterr().err
