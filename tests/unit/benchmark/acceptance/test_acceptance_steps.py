"""The programs of every step are valid, and their results are read."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from switchtitan.benchmark.acceptance.machine import Machine, read_machine
from switchtitan.benchmark.acceptance.programs import Result
from switchtitan.benchmark.acceptance.report import page_lines
from switchtitan.benchmark.acceptance.steps import STEPS, Place, Step
from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.cli.benchmark import read_options
from switchtitan.distributed.compute_dtype import gpu_support
from switchtitan.job.config import parse_arguments

ROOT = Path(__file__).parents[4]
CARD = Machine("NVIDIA H100 80GB HBM3", 1, 79.2, {"flash-attn": "not installed"})
BY_NAME = {step.name: step for step in STEPS}


def place_in(folder: Path, num_gpus: int = 1, memory_gib: float = 79.2) -> Place:
    machine = replace(CARD, num_gpus=num_gpus, memory_gib=memory_gib)
    return Place(machine, ROOT, folder)


@pytest.mark.parametrize("num_gpus", [1, 8])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_options_of_every_program_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, num_gpus: int
) -> None:
    # As on a machine with these GPUs and the package flash-attn.
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cuda")
    support = gpu_support(CARD.card, (9, 0))
    monkeypatch.setattr("switchtitan.job.checks.bf16_support", lambda device: support)
    monkeypatch.setattr(
        "switchtitan.models.llama.attention.importlib.util.find_spec", lambda name: name
    )
    commands = step.commands(place_in(tmp_path, num_gpus))
    assert commands
    for command in commands:
        if command[1] == "-c":
            continue
        if "pytest" in command:
            assert all((ROOT / word).exists() for word in command if word.startswith("tests/"))
            continue
        if "launch" in command:
            assert command[5] == f"--nproc_per_node={num_gpus}"
        # "train" is also the name of a tokenizer.
        if "benchmark" in command:
            own, overrides = split_overrides(command[command.index("benchmark") + 1 :])
            options = read_options(own)
            on_ranks = num_gpus if "launch" in command else 1
            monkeypatch.setenv("WORLD_SIZE", str(on_ranks))
            load_sides(getattr(options, "configs", [getattr(options, "config", "")]), overrides)
        elif "train" in command:
            parse_arguments(command[command.index("train") + 1 :], num_gpus)


def test_batches_fit_the_gpu(tmp_path: Path) -> None:
    sizes = [place_in(tmp_path, 1, memory).local_batch_size for memory in (11, 15, 24, 40, 80)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    # 6 GiB of state and 0.6 GiB a sequence.
    for memory in (15, 24, 40, 80):
        place = place_in(tmp_path, 1, memory)
        assert 6 + 0.6 * place.local_batch_size < 0.95 * memory
        assert 12 + 0.6 * place.local_batch_size_of_two < 0.95 * memory


@pytest.mark.parametrize("name", ["step", "switch", "optimizer"])
def test_benchmarks_take_batches_of_two_models(tmp_path: Path, name: str) -> None:
    place = place_in(tmp_path)
    (command,) = BY_NAME[name].commands(place)
    size = command[command.index("--training.local_batch_size") + 1]
    assert int(size) == place.local_batch_size_of_two < place.local_batch_size


@pytest.mark.parametrize(
    ("name", "num_runs"), [("train", 2), ("flex", 1), ("offload", 1), ("save_and_resume", 1)]
)
def test_training_steps_first_remove_their_earlier_runs(
    tmp_path: Path, name: str, num_runs: int
) -> None:
    """A run does not start in a folder with checkpoints if it must not resume."""
    commands = BY_NAME[name].commands(place_in(tmp_path))
    removals = [command for command in commands if command[1] == "-c"]
    assert len(removals) == num_runs
    for removal in removals:
        checkpoints = Path(removal[-1]) / "checkpoints"
        checkpoints.mkdir(parents=True)
        following = commands[commands.index(removal) + 1]
        assert removal[-1] == following[following.index("--job.output_dir") + 1]
        subprocess.run(removal, check=True, timeout=60)
        assert not checkpoints.parent.exists()


def test_nccl_needs_two_gpus(tmp_path: Path) -> None:
    obstacle = BY_NAME["nccl_tests"].obstacle
    assert obstacle(place_in(tmp_path)) == "only one GPU is visible"
    assert obstacle(place_in(tmp_path, 2)) is None


def test_speeds_of_training_runs_are_read(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    for run, speed in (("llama_350m_full_rank", 1234.5), ("llama_350m_switchlora", 2345.6)):
        folder = tmp_path / "train" / run
        folder.mkdir(parents=True)
        results = {
            "throughput/tokens_per_s": speed,
            "throughput/mfu": 0.4321,
            "memory/peak_gib": 33.33,
            "memory/state_gib": 5.5,
            "num_ranks": 1,
        }
        (folder / "results.json").write_text(json.dumps(results))
    figures, table = BY_NAME["train"].read(place)
    assert figures["llama_350m_switchlora"]["tokens_per_s"] == 2345.6
    assert "| llama_350m_full_rank | 1,234 | 43.2 % | 33.3 |" in table
    # An unknown card.
    results["throughput/mfu"] = None
    (folder / "results.json").write_text(json.dumps(results))
    assert "unknown peak" in BY_NAME["train"].read(place)[1][-1]


def test_tables_of_benchmarks_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "switch"
    folder.mkdir()
    (folder / "benchmark.json").write_text('{"switches": {}}')
    (folder / "log.txt").write_text(
        "$ python -m switchtitan benchmark\na warning\nms/switch  99 %\n     1.5   2.0\n"
    )
    figures, table = BY_NAME["switch"].read(place_in(tmp_path))
    assert figures == {"switches": {}}
    assert table == ["```", "ms/switch  99 %", "     1.5   2.0", "```"]


def test_a_run_that_did_not_resume_fails_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "save_and_resume"
    (folder / "llama_350m_switchlora").mkdir(parents=True)
    (folder / "llama_350m_switchlora" / "results.json").write_text('{"step": 8}')
    log = folder / "log.txt"
    log.write_text("resuming from checkpoints/step-000000004")
    assert BY_NAME["save_and_resume"].read(place_in(tmp_path))[0]["step"] == 8
    log.write_text("starting a new run")
    with pytest.raises(ValueError, match="did not resume"):
        BY_NAME["save_and_resume"].read(place_in(tmp_path))


def test_flash_attn_is_skipped_where_it_is_not_installed(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    assert "not installed" in str(BY_NAME["flash_attn"].obstacle(place))
    with_package = replace(place, machine=replace(CARD, facts={"flash-attn": "2.7"}))
    assert BY_NAME["flash_attn"].obstacle(with_package) is None


def test_cards_are_named_for_files() -> None:
    assert CARD.slug == "nvidia_h100_80gb_hbm3"
    assert replace(CARD, num_gpus=8).slug == "8x_nvidia_h100_80gb_hbm3"
    assert replace(CARD, card="../../etc/passwd").slug == "etc_passwd"
    assert replace(CARD, card="///").slug == "gpu"


def test_machines_are_read_from_the_last_line() -> None:
    assert read_machine("a warning\nnull\n") is None
    text = '{"card": "G1", "num_gpus": 2, "memory_gib": 8.0, "facts": {}}'
    assert read_machine(f"a warning\n{text}\n") == Machine("G1", 2, 8.0, {})


def test_reasons_do_not_break_the_table() -> None:
    result = Result("train", "failed", 1.0, "a | b\nc")
    assert "| train | failed: a / b c | 1 |" in page_lines(CARD, [result], "command", "today")
