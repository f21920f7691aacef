"""`switchtitan benchmark` prints a table and a line of JSON, and writes no files."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.tiny import METHOD_KEYS, TINY

from switchtitan.observability.environment import versions

FEW_SHAPES = ("--method.targets", "down_proj")  # every shape is compiled by itself, for seconds
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.benchmark")


@pytest.fixture
def file(corpora: Path) -> str:
    folder = corpora / "benchmark"
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.toml"
    path.write_text(
        TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    )
    return str(path)


def test_steps_are_compared_in_a_table_and_a_record(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "step",
        file,
        f"{file}:method.rank=4",
        "--rounds",
        "3",
        "--steps-per-round",
        "2",
        "--job.seed",
        "1",
    ]
    script.main(argv)
    *_, header, first, second, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "ms/step"
    assert first.endswith(f"  {file}")
    assert second.endswith(f"  {file}:method.rank=4")
    record = json.loads(line)
    assert record["command"] == "switchtitan benchmark " + " ".join(argv)
    assert record["environment"].items() >= versions().items()
    assert record["environment"]["num_threads"] == torch.get_num_threads()
    reference, other = record["steps"][file], record["steps"][f"{file}:method.rank=4"]
    assert reference["ratio"] == 1
    assert other["ratio_interval_95"][0] <= other["ratio"] <= other["ratio_interval_95"][1]
    assert len(other["round_medians_s"]) == 3
    assert 0 < other["optimizer_s"] < other["step_s"]
    assert not (Path(file).parent / "run").exists()


def test_communication_is_counted_in_a_table_and_a_record(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["communication", file, "--num-ranks", "4", "--step", "1"])
    title, header, row, line = capsys.readouterr().out.splitlines()
    assert "each of 4 ranks in step 1" in title
    assert header.split() == ["MiB/step", "all_gather", "reduce_scatter", "all_reduce"]
    assert row.endswith(f"  {file}")
    counts = json.loads(line)["communication"][file]
    # One micro-batch: two blocks forward and backward, and the rest once.
    assert counts["all_gather"]["num_calls"] == 5
    assert counts["broadcast"] == {"num_calls": 0, "bytes_sent": 0}


def test_the_record_goes_to_a_file_if_one_is_given(script, file, tmp_path, capsys):
    argv = ["communication", file, "--num-ranks", "4"]
    script.main([*argv, "--json", str(tmp_path / "counts.json"), "--job.seed", "1"])
    assert "{" not in capsys.readouterr().out
    record = json.loads((tmp_path / "counts.json").read_text())
    command = ["switchtitan benchmark", *argv, "--job.seed", "1"]
    assert record["command"] == " ".join(command)
    assert record["communication"].keys() == {file}


def test_a_missing_folder_for_the_record_is_refused_before_measuring(
    script, file, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="2"):
        script.main(["step", file, "--json", str(tmp_path / "missing" / "step.json")])
    assert "no folder" in capsys.readouterr().err


def test_layers_are_timed_in_every_contraction(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(
        [
            *(
                "layer",
                "--shape",
                "24x16",
                "8x16",
                "--rank",
                "2",
                "7",
                "--tokens",
                "5",
                "--rounds",
                "2",
            ),
            *("--calls-per-round", "1", "--dtype", "float32"),
        ]
    )
    *lines, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert len(record["layers"]) == 4
    of_layer = record["layers"]["[24, 16] rank 2, 5 tokens"]
    assert list(of_layer["calls"]) == ["full rank", "factored", "merged", "dense_gradient"]
    assert of_layer["calls"]["full rank"]["ratio"] == 1
    assert of_layer["flops"]["full rank"] == 6 * 24 * 16 * 5
    # Few tokens: building W + s B A would cost more than it saves.
    assert (
        of_layer["chosen"]
        == "factored"
        == min(of_layer["flops"], key=of_layer["flops"].__getitem__)
    )
    assert of_layer["excess_of_choice"] > 0
    assert sum("(chosen)" in text for text in lines) == 4
    assert lines[-1].startswith("[8, 16] rank 7, 5 tokens: ")


def test_the_update_of_factors_is_timed_next_to_torchs(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(
        [
            "optimizer",
            file,
            "--model.num_layers",
            "1",
            "--rounds",
            "2",
            "--calls-per-round",
            "2",
            *FEW_SHAPES,
        ]
    )
    title, header, first, *_, line = capsys.readouterr().out.splitlines()
    assert title.startswith("update of 2 factors, 0.0 M elements")
    assert header.split()[0] == "ms/call"
    assert first.endswith("  torch.optim.AdamW, fused")
    record = json.loads(line)
    assert record["num_elements"] == 6 * (20 + 28)
    assert all(update["call_s"] > 0 for update in record["updates"].values())
    assert len(record["updates"]) == 3


def test_loading_is_compared_with_training(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(
        ["loader", file, "--training-tokens-per-s", "10", "--rounds", "2", "--calls-per-round", "2"]
    )
    header, read, trained, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "tokens/s"
    assert read.endswith("  read by 0 workers")
    assert trained.split() == ["10", "1", "trained", "on"]
    record = json.loads(line)
    assert record["ratio"] == record["tokens_read_per_s"] / 10
    assert len(record["round_tokens_read_per_s"]) == 2
    assert not record["training_was_measured"]


def test_saves_are_timed_and_leave_no_files(
    script: ModuleType, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["checkpoint", file, "--folder", str(tmp_path), "--rounds", "2", "--steps", "1"])
    *lines, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert len(record["each_synchronous_s"]) == len(record["each_stall_s"]) == 2
    assert record["bytes_on_disk"] > record["state_bytes"] > 0
    before, after = record["control_before_saves"], record["control_after_saves"]
    assert len(before) == len(after) == 4
    assert record["speed_after_saves"] == pytest.approx(np.median(before) / np.median(after))
    assert "MiB on disk for" in lines[-2]
    assert f"run at {record['speed_after_saves']:.3f} of" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_startup_is_split_into_its_parts(
    script: ModuleType, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["startup", file])
    *lines, line = capsys.readouterr().out.splitlines()
    for start in json.loads(line)["startup"].values():
        parts = start["parts_s"]
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(start["to_first_step_s"] + parts["second step"])
    assert lines[0].split() == ["s", "cold", "cache", "warm", "cache"]
    assert lines[-1].endswith("  to the end of the first step")


def test_losses_are_compared_in_time_and_memory(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(
        [
            "loss",
            "--tokens",
            "40",
            "--hidden",
            "6",
            "--vocabulary",
            "70",
            "--dtype",
            "float32",
            "--rounds",
            "2",
        ]
    )
    header, *rows, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "ms/call"
    names = ["all logits", "all logits, compiled", "chunks", "chunks, compiled"]
    assert all(row.endswith(f"  {name}") for row, name in zip(rows, names, strict=True))
    record = json.loads(line)
    assert len(record["calls"]["chunks"]["round_medians_s"]) == 2
    # One chunk: one buffer for logits and gradient instead of several.
    assert record["memory"]["chunks"]["ratio"] < 0.5
    assert record["memory"]["all logits"]["peak_extra_bytes"] > 2 * 4 * 40 * 70


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["communication", "FILE"], "--num-ranks"),
        (["step", "FILE", "--rounds", "0"], "expected an integer >= 1"),
        (["communication", "FILE", "--num-ranks", "x"], "x: expected an integer >= 1"),
        (["step", "FILE:method.rnk=3"], "did you mean rank?"),
        (["step", "FILE:method.rnk=3"], ":method.rnk=3: invalid configuration"),
        (["step", "FILE", "--training.steps", "9"], "expected at least 53"),
        (["step", "no-such.toml"], "no such file"),
        (["layer", "--shape", "8x6", "--rank", "6"], "less than the smaller dimension of [8, 6]"),
        (
            ["layer", "--model.size", "9m"],
            "--model.size: switchtitan benchmark layer reads no configuration",
        ),
        (
            ["optimizer", str(ROOT / "train_configs" / "llama_60m_full_rank.toml")],
            "has no low-rank layers",
        ),
        ([], "step | communication | layer"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType, file: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main([word.replace("FILE", file) for word in argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
