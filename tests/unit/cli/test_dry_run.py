"""`train --dry-run` says what training would do, fails as it would, and writes nothing."""

import hashlib
import os
import re
from pathlib import Path

import pytest
from support.commands import run
from support.tiny import tiny_config, tiny_trainer, train_steps

from switchtitan.benchmark.run_plan import plan_run
from switchtitan.config.toml_text import toml_value
from switchtitan.distributed.world import stop_world
from switchtitan.training.description import count_parameters


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and checksum of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def trained(corpora: Path) -> tuple[Path, dict[str, int]]:
    """The configuration of a run with a checkpoint after 7 of 40 steps, and its parameters."""
    trainer = tiny_trainer(corpora / "dry", "switchlora")
    train_steps(trainer, 7)
    trainer.save()
    trainer.checkpointer.finish()
    counts = count_parameters(trainer.stepper.model)
    trainer.stepper.close()
    trainer.reporter.close()
    stop_world()  # a dry run has a group of its own
    return corpora / "dry" / f"switchlora-{os.getpid()}.toml", counts


def test_a_run_that_would_resume_is_described_and_nothing_is_written(
    trained: tuple[Path, dict[str, int]], corpora: Path
) -> None:
    file, counts = trained
    before = contents(corpora)
    outcome = run("train", "--config", file, "--dry-run", "--optimizer.lr", "0.5")
    assert (outcome.status, outcome.errors) == (0, "")
    assert contents(corpora) == before
    checkpoint = corpora / "dry" / "run" / "checkpoints" / "step-000000007"
    assert f"would resume from {checkpoint}: step 7 of 40" in outcome.output
    assert "optimizer.lr: 0.01 -> 0.5" in outcome.output
    parameters = ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number)
    assert f"parameters    {parameters}" in outcome.output
    assert "33 of 128 tokens: 4.22k tokens" in outcome.output
    assert "prepared in " in outcome.output
    assert "saved 2 times" in outcome.output


def test_the_checkpoint_takes_what_is_foretold(
    trained: tuple[Path, dict[str, int]], corpora: Path
) -> None:
    config = tiny_config(corpora / "dry", "switchlora")
    plan = plan_run(config, num_ranks=1)
    checkpoint = corpora / "dry" / "run" / "checkpoints" / "step-000000007"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    # The headers of a file for each tensor are as large as the tensors of so small a model.
    assert size == pytest.approx(plan.disk.checkpoint_bytes, rel=0.3)
    assert plan.num_steps == 33
    assert plan.flops > 0


def test_training_writes_what_the_dry_run_does_not(
    trained: tuple[Path, dict[str, int]], corpora: Path
) -> None:
    file, _ = trained
    before = contents(corpora / "dry")
    assert run("train", "--config", file, "--training.steps", "8").status == 0
    assert contents(corpora / "dry") != before


def test_a_corpus_that_is_missing_would_be_prepared(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "new", "lora")
    file = tmp_path / "new" / f"lora-{os.getpid()}.toml"
    before = contents(tmp_path)
    outcome = run("train", "--config", file, "--dry-run")
    assert outcome.status == 0
    assert contents(tmp_path) == before
    assert f"a new run in {config.job.output_dir}" in outcome.output
    assert "not prepared: would be prepared in " in outcome.output
    assert "passes over" not in outcome.output


def test_a_mixture_is_described_before_and_after_it_is_prepared(tmp_path: Path) -> None:
    for name, line in {"words": "all rows of a matrix", "more": "x = y @ w.t() + b"}.items():
        (tmp_path / name).mkdir()
        for number in range(40):
            text = f"{line} {number}\n" * (20 + number)
            (tmp_path / name / f"{number}.txt").write_text(text)
    tiny_config(tmp_path, "full_rank")
    file = tmp_path / f"full_rank-{os.getpid()}.toml"
    sources = [
        {"weight": 3, "dataset": "text", "path": str(tmp_path / "words")},
        {"weight": 1, "dataset": "text", "path": str(tmp_path / "more")},
    ]
    mixture = ["--data.max_bytes", "none", "--data.sources"]
    words = ["train", "--config", file, *mixture, toml_value(sources)]
    before = contents(tmp_path)
    outcome = run(*words, "--dry-run")
    assert (outcome.status, outcome.errors) == (0, "")
    assert contents(tmp_path) == before
    assert "75.00% " in outcome.output
    assert "25.00% " in outcome.output
    assert "not prepared: would be prepared in " in outcome.output
    assert "would be prepared with the first source's tokenizer" in outcome.output
    assert "passes over" not in outcome.output

    assert run(*words, "--training.steps", "1").status == 0
    outcome = run(*words, "--dry-run")
    assert (outcome.status, outcome.errors) == (0, "")
    prepared = re.findall(r"prepared in \S+: ([\d,]+) tokens to train on", outcome.output)
    num_tokens = [int(number.replace(",", "")) for number in prepared]
    passes = re.search(r"(\S+) and (\S+) passes over the training splits", outcome.output)
    assert passes is not None
    found = [float(number) for number in passes.groups()]
    run_tokens = 39 * 128
    expected = [0.75 * run_tokens / num_tokens[0], 0.25 * run_tokens / num_tokens[1]]
    assert found == pytest.approx(expected, rel=0.01)


def test_several_ranks_are_described_without_starting_them(tmp_path: Path) -> None:
    tiny_config(tmp_path, "full_rank")
    file = tmp_path / f"full_rank-{os.getpid()}.toml"
    words = ["launch", "--standalone", "--nproc_per_node", "2", "train", "--config", file]
    outcome = run(*words, "--dry-run")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.count("dry run: nothing is trained") == 1
    assert re.search(r"devices +2 x ", outcome.output)
    words[words.index("2")] = "auto"
    run(*words, "--dry-run").check_refused("--dry-run: the number of ranks is not known")


@pytest.mark.parametrize(
    "words",
    [
        ["--training.steps", "0"],
        ["--job.output_dir", "/dev/null/run"],
        ["--checkpoint.resume", "never"],
        ["--checkpoint.resume", "/no/such/checkpoint"],
        ["--job.seed", "43"],
        ["--method.rank", "5"],
        ["--training.global_batch_size", "200000"],
        ["--evaluation.test_tokens", "160"],
    ],
)
def test_mistakes_are_those_of_training(
    trained: tuple[Path, dict[str, int]], words: list[str]
) -> None:
    file, _ = trained
    dry = run("train", "--config", file, *words, "--dry-run")
    wet = run("train", "--config", file, *words)
    assert dry.status == wet.status == 2
    assert dry.errors == wet.errors
    assert dry.errors.startswith("error: ")


def test_the_time_needs_a_known_peak_and_bf16(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "full_rank", "--training.dtype", "bfloat16")
    plan = plan_run(config, num_ranks=1)
    assert plan.duration_s(0.5) is None
    known = type(plan)(**{**vars(plan), "device": "NVIDIA H100 PCIe"})
    expected_s = plan.step.full_rank_flops * 40 / (0.5 * 756.5e12)
    assert known.duration_s(0.5) == pytest.approx(expected_s)
