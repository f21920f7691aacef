"""The steps of an acceptance: programs to run, and what to read from their results."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

from pydantic import JsonValue

from switchtitan.benchmark.acceptance.machine import Machine

Commands = list[list[str]]
Figures = dict[str, JsonValue]

NUM_STEPS = 50
"""Training steps of the main job."""
_FULL_RANK = "train_configs/llama_350m_full_rank.toml"
_SWITCHLORA = "train_configs/llama_350m_switchlora.toml"
# Speed does not depend on the tokens; this corpus requires no network.
_OFFLINE = {
    "data.dataset": "pystdlib",
    "data.tokenizer": "train",
    "data.vocab_size": "1024",
    "data.max_documents": "none",
    "data.offline_dataset": "none",
    "data.validation_fraction": "0.04",
    "data.test_fraction": "0.04",
}
# GiB of a GPU -> sequences per GPU of the 350M model, which takes 6 GiB of state and 0.6 GiB for
# each sequence of 512 tokens (docs/measurements/one_gpu.json).
_LOCAL_BATCH_SIZES = ((70, 72), (36, 36), (22, 16), (14, 8), (0, 4))
# The same if two models are held at once, 12 GiB of state.
_LOCAL_BATCH_SIZES_OF_TWO = ((70, 48), (36, 24), (22, 12), (14, 2), (0, 1))


@dataclass(frozen=True)
class Place:
    """Where steps run."""

    machine: Machine
    project: Path
    """The checkout."""
    folder: Path
    """Logs and results, a subfolder for each step."""

    @property
    def local_batch_size(self) -> int:
        return self._size_in(_LOCAL_BATCH_SIZES)

    @property
    def local_batch_size_of_two(self) -> int:
        """Sequences per GPU if a benchmark holds two steppers, each with its state."""
        return self._size_in(_LOCAL_BATCH_SIZES_OF_TWO)

    def _size_in(self, sizes: Sequence[tuple[int, int]]) -> int:
        return next(size for memory, size in sizes if self.machine.memory_gib >= memory)

    def with_one_gpu(self) -> "Place":
        return replace(self, machine=replace(self.machine, num_gpus=1))

    def switchtitan(self, command: str, *arguments: str) -> list[str]:
        """Returns the command that runs `switchtitan COMMAND ARGUMENTS` on all GPUs."""
        program = [sys.executable, "-m", "switchtitan"]
        if self.machine.num_gpus > 1:
            program += ["launch", "--standalone", f"--nproc_per_node={self.machine.num_gpus}"]
        return [*program, command, *arguments]


def _never(place: Place) -> str | None:
    return None


def _read_nothing(place: Place) -> tuple[Figures, list[str]]:
    return {}, []


@dataclass(frozen=True)
class Step:
    """One step. It fails if a program fails, or if its results cannot be read."""

    name: str
    summary: str
    commands: Callable[[Place], Commands]
    read: Callable[[Place], tuple[Figures, list[str]]] = _read_nothing
    """Returns figures for the JSON, and lines of a table for the page."""
    obstacle: Callable[[Place], str | None] = _never
    """Why the step cannot run on this machine, which skips it; None if it can."""
    timeout_s: float = 1800


def _one_gpu(place: Place) -> str | None:
    return "only one GPU is visible" if place.machine.num_gpus == 1 else None


def _tests(
    name: str,
    summary: str,
    *arguments: str,
    obstacle: Callable[[Place], str | None] = _never,
) -> Step:
    """A step that runs tests; it fails if none passed, since pytest ends well if it skips all."""

    def report(place: Place) -> Path:
        return place.folder / name / "junit.xml"

    def commands(place: Place) -> Commands:
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", f"--junitxml={report(place)}"]
        return [[*pytest, *arguments]]

    def read(place: Place) -> tuple[Figures, list[str]]:
        counts = count_tests(report(place))
        if not counts["passed"]:
            raise ValueError(f"no test passed, {counts['skipped']} were skipped")
        return {**counts}, [f"{counts['passed']} passed, {counts['skipped']} skipped"]

    return Step(name, summary, commands, read, obstacle)


def count_tests(report: Path) -> dict[str, int]:
    """Returns how many tests passed and were skipped, by pytest's report in JUnit's format.

    Raises:
        OSError: if the report is missing.
        ValueError: if it is not such a report.
    """
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{report} is no XML: {error}") from error
    keys = ("tests", "skipped", "failures", "errors")
    total, skipped, failures, errors = (
        sum(int(suite.attrib[key]) for suite in suites) for key in keys
    )
    return {"passed": total - skipped - failures - errors, "skipped": skipped}


def _batch(size: int, num_gpus: int) -> dict[str, str]:
    return {
        "training.local_batch_size": str(size),
        "training.global_batch_size": str(size * num_gpus),
    }


def _options(keys: Mapping[str, str]) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


def _train(
    place: Place, step: str, config: str, num_steps: int, keys: Mapping[str, str]
) -> list[str]:
    """Returns the command of a training run of a step, which saves only at its end."""
    run = {
        "job.output_dir": str(place.folder / step / Path(config).stem),
        "training.steps": str(num_steps),
        "lr_schedule.warmup_steps": "2",
        "metrics.interval": "5",
        "checkpoint.interval": "1000000",
        "checkpoint.resume": "never",
    }
    batch = _batch(place.local_batch_size, place.machine.num_gpus)
    options = _options({**_OFFLINE, **batch, **run, **keys})
    return place.switchtitan("train", "--config", config, *options)


def _remove(folder: Path) -> list[str]:
    """Returns the command that removes the folder of an earlier acceptance, if there is one."""
    remove = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    return [sys.executable, "-c", remove, str(folder)]


def _training_step(
    name: str,
    summary: str,
    configs: Sequence[str],
    num_steps: int = NUM_STEPS,
    keys: Mapping[str, str] = MappingProxyType({}),
    obstacle: Callable[[Place], str | None] = _never,
) -> Step:
    """A step that trains each of `configs` and reports its speed."""

    def commands(place: Place) -> Commands:
        return [
            command
            for config in configs
            for command in (
                _remove(place.folder / name / Path(config).stem),
                _train(place, name, config, num_steps, keys),
            )
        ]

    def read(place: Place) -> tuple[Figures, list[str]]:
        runs = [Path(config).stem for config in configs]
        figures: Figures = {run: _training_figures(place.folder / name / run) for run in runs}
        return figures, _training_table(figures)

    return Step(name, summary, commands, read, obstacle)


def _training_figures(run: Path) -> Figures:
    result = json.loads((run / "results.json").read_text(encoding="utf-8"))
    keys = {
        "throughput/tokens_per_s": "tokens_per_s",
        "throughput/mfu": "mfu",
        "memory/peak_gib": "peak_memory_gib",
        "memory/state_gib": "state_gib",
    }
    return {name: result[key] for key, name in keys.items()} | {"num_ranks": result["num_ranks"]}


def _training_table(figures: Figures) -> list[str]:
    lines = [
        "| run | tokens/s | MFU | peak memory per GPU, GiB |",
        "|---|---:|---:|---:|",
    ]
    for run, values in figures.items():
        assert isinstance(values, dict)
        speed, mfu, peak = (values[key] for key in ("tokens_per_s", "mfu", "peak_memory_gib"))
        cells = [
            "" if speed is None else f"{speed:,.0f}",
            "unknown peak FLOP/s" if mfu is None else f"{100 * float(str(mfu)):.1f} %",
            f"{peak:.1f}",
        ]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return lines


def _benchmark(name: str, *arguments: str, on_all_gpus: bool) -> Step:
    """A step that runs one benchmark and keeps its table."""

    def commands(place: Place) -> Commands:
        batch = _batch(place.local_batch_size_of_two, place.machine.num_gpus)
        options = _options({**_OFFLINE, **batch})
        given = [*arguments, *options, "--json", str(place.folder / name / "benchmark.json")]
        where = place if on_all_gpus else place.with_one_gpu()
        return [where.switchtitan("benchmark", *given)]

    def read(place: Place) -> tuple[Figures, list[str]]:
        figures = json.loads((place.folder / name / "benchmark.json").read_text())
        log = (place.folder / name / "log.txt").read_text(encoding="utf-8", errors="replace")
        return figures, ["```", *_table_in(log), "```"]

    summary = f"`switchtitan benchmark {' '.join(arguments)}`"
    return Step(name, summary, commands, read)


def _table_in(log: str) -> list[str]:
    """Returns the last lines of a benchmark's output from the header of its table on."""
    lines = log.rstrip().splitlines()
    headers = [
        index for index, line in enumerate(lines) if "ms/" in line and not line.startswith("$")
    ]
    return lines[headers[-1] :] if headers else lines[-10:]


def _save_and_resume() -> Step:
    name, num_first, num_all = "save_and_resume", 4, 8
    run = Path(_SWITCHLORA).stem

    def commands(place: Place) -> Commands:
        keys = {"checkpoint.interval": str(num_first), "checkpoint.resume": "auto"}
        return [
            _remove(place.folder / name / run),
            *(_train(place, name, _SWITCHLORA, steps, keys) for steps in (num_first, num_all)),
        ]

    def read(place: Place) -> tuple[Figures, list[str]]:
        log = (place.folder / name / "log.txt").read_text(encoding="utf-8", errors="replace")
        if f"step-{num_first:09}" not in log or "resuming from" not in log:
            raise ValueError(f"the second run did not resume from step {num_first}")
        results = (place.folder / name / run / "results.json").read_text(encoding="utf-8")
        if (last_step := json.loads(results)["step"]) != num_all:
            raise ValueError(f"the second run ended at step {last_step}, not {num_all}")
        return {"resumed_from": num_first, "step": num_all}, []

    return Step(name, "save, stop, and resume a SwitchLoRA run", commands, read)


def _no_flash(place: Place) -> str | None:
    installed = place.machine.facts.get("flash-attn") != "not installed"
    return None if installed else "the package flash-attn is not installed"


def _variant(
    name: str,
    summary: str,
    keys: Mapping[str, str],
    obstacle: Callable[[Place], str | None] = _never,
) -> Step:
    return _training_step(name, summary, [_SWITCHLORA], 20, keys, obstacle)


STEPS: tuple[Step, ...] = (
    _tests(
        "gpu_tests",
        "tests on one GPU: every method trains, compiled, in bfloat16",
        *("tests/gpu", "--ignore", "tests/gpu/test_nccl.py"),
    ),
    _tests(
        "nccl_tests",
        "tests on all GPUs over NCCL: sharded equals single, switches keep the function, "
        "checkpoints load on one rank",
        "tests/gpu/test_nccl.py",
        obstacle=_one_gpu,
    ),
    _training_step(
        "train",
        f"the main job, {NUM_STEPS} steps, compiled: full rank and SwitchLoRA",
        [_FULL_RANK, _SWITCHLORA],
    ),
    _benchmark(
        *("step", "step", _FULL_RANK, _SWITCHLORA, "--rounds", "4", "--steps-per-round", "5"),
        on_all_gpus=True,
    ),
    _benchmark(
        *("switch", "switch", _SWITCHLORA, "--rounds", "4", "--steps-per-round", "10"),
        on_all_gpus=True,
    ),
    _save_and_resume(),
    _variant("flex", "flex attention", {"model.attention": "flex"}),
    _variant("flash_attn", "the package flash-attn", {"model.attention": "flash_attn"}, _no_flash),
    _variant("host_candidates", "candidates in host memory", {"method.candidates_device": "host"}),
)
"""In the order in which they run."""
