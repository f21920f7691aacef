"""`switchtitan estimate` prints tables and a line of JSON, and writes no files."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny import METHOD_KEYS, TINY

from switchtitan.benchmark.tables import batch_size_cell

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.estimate")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(
        TINY.format(folder=tmp_path, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    )
    return str(path)


def test_estimates_are_in_tables_and_a_record(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [file, f"{file}:method.rank=4", "--world-size", "4", "--job.seed", "1"]
    script.main(argv)
    *text, line = capsys.readouterr().out.splitlines()
    assert "each of 4 ranks" in text[0]
    tables = [
        row.split()[0]
        for row in text
        if row.startswith(("peak", "most", " GiB", "MiB/step", "TFLOP"))
    ]
    assert tables == ["GiB", "peak", "most", "peak", "most", "MiB/step", "TFLOP/step"]
    record = json.loads(line)
    assert record["command"] == "switchtitan estimate " + " ".join(argv)
    assert record["assumptions"] == [row.removeprefix("- ") for row in text if row.startswith("- ")]
    first, second = record["estimates"][file], record["estimates"][f"{file}:method.rank=4"]
    assert first["memory"]["peak"] == sum(first["memory"]["at_peak"].values())
    assert first["memory"]["state"] > second["memory"]["state"]
    assert first["flops"]["ratio"] > second["flops"]["ratio"]
    assert first["communication"]["reduce_scatter"]["num_calls"] == 4
    assert [path.name for path in Path(file).parent.iterdir()] == ["tiny.toml"]


def test_fit_prints_the_largest_micro_batches_and_their_peaks(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = f"{file}:model.hidden_size=40"
    script.main([file, wide, "--world-size", "2", "--fit", "1e-4", "0.003", "80"])
    *text, line = capsys.readouterr().out.splitlines()
    assert text[1].split() == [
        "0.0001",
        "GiB",
        "0.003",
        "GiB",
        "80",
        "GiB",
        "peak",
        "GiB",
        "with",
        "1",
    ]
    record = json.loads(line)
    assert record["assumptions"] == [row.removeprefix("- ") for row in text if row.startswith("- ")]
    narrow, wider = record["fits"][file], record["fits"][wide]
    for row, side in zip(text[2:4], (narrow, wider), strict=True):
        sizes = side["batch_size"]
        assert (sizes["0.0001"], sizes["80"]) == (0, 64)
        assert row.split()[:3] == ["no", batch_size_cell(sizes["0.003"]), "64+"]
        most = 0.9 * 0.003 * 2**30
        assert side["peak"][str(sizes["0.003"])] <= most < side["peak"][str(sizes["0.003"] + 1)]
    assert narrow["batch_size"]["0.003"] > wider["batch_size"]["0.003"] >= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["FILE"], "--world-size"),
        (["FILE", "--world-size", "0"], "expected an integer >= 1"),
        (["FILE:method.rnk=3", "--world-size", "2"], "did you mean rank?"),
        (["FILE", "--world-size", "3"], "global_batch_size"),
        (["FILE", "--world-size", "2", "--fit", "24GB"], "expected GiB of memory"),
        (["FILE", "--world-size", "2", "--fit", "-1"], "--fit"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType, file: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main([word.replace("FILE", file) for word in argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_auto_is_estimated_in_bfloat16(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {key: f"{file}:training.dtype={key}" for key in ("auto", "bfloat16", "float32")}
    script.main([*sides.values(), "--world-size", "2"])
    *text, line = capsys.readouterr().out.splitlines()
    assert any('dtype = "auto" means bfloat16' in row for row in text)
    auto, short, long = (json.loads(line)["estimates"][side] for side in sides.values())
    assert auto == short
    assert auto["memory"]["peak"] < long["memory"]["peak"]
