"""`switchtitan benchmark checkpoint`: training time lost to synchronous and asynchronous saves, the
speed of steps after them, and their size on disk."""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from switchtitan.benchmark.commands.command import Command, Measurement, Overrides, add_config
from switchtitan.benchmark.save_parts import time_parts
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.steppers import real_stepper
from switchtitan.benchmark.tables import aligned
from switchtitan.benchmark.timing import alternate
from switchtitan.checkpoint import Checkpointer
from switchtitan.checkpoint.config import RESUME_NEVER, CheckpointConfig
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.shards import local
from switchtitan.distributed.world import temporary_world
from switchtitan.job.config import JobConfig
from switchtitan.training.step import Stepper

_WARM_UP_STEPS = 3
_MAX_STEPS_PER_SAVE = 1000


@dataclass
class SaveTimes:
    """Seconds, one entry for each round or step, and bytes."""

    synchronous_s: list[float] = field(default_factory=list)
    """Time of a synchronous save, with its search for values that are not finite."""
    stall_s: list[float] = field(default_factory=list)
    """Training time lost to an asynchronous save: in that search, `save`, all calls of `poll`, and
    `finish`."""
    step_before_saves_s: list[float] = field(default_factory=list)
    """Steps before the first save."""
    undisturbed_step_s: list[float] = field(default_factory=list)
    """Steps after a save, during none."""
    step_while_saving_s: list[float] = field(default_factory=list)
    control_before_saves: list[float] = field(default_factory=list)
    """Ratio of a step's time to that of the next step in a process that never saves, before the
    first save. One entry for each pair; empty without such a process."""
    control_after_saves: list[float] = field(default_factory=list)
    """The same after a save."""
    parts_s: dict[str, float] = field(default_factory=dict)
    """What a save does with its bytes, one after the other, by themselves; see `time_parts`."""
    bytes_on_disk: int = 0
    state_bytes: int = 0
    """Bytes of this rank's tensors."""

    @property
    def speed_after_saves(self) -> float:
        """Speed of steps after saves, in parts of the speed before the first one.

        Both are relative to a process that never saves, if there is one: other load on the machine
        changes with time, and slows both down.
        """
        before, after = self.control_before_saves, self.control_after_saves
        if not before:
            before, after = self.step_before_saves_s, self.undisturbed_step_s
        return float(np.median(before) / np.median(after))


def time_saves(
    stepper: Stepper,
    folder: Path,
    rounds: int,
    undisturbed_steps: int,
    control: Callable[[], float] | None = None,
) -> SaveTimes:
    """Runs steps with and without a save in progress.

    Each round saves once asynchronously and once synchronously, in alternating order, and takes
    `undisturbed_steps` steps after each save. As many steps precede the first save.

    Args:
        control: takes a step in a process that never saves, and returns its seconds. Both
            processes take turns at each step.
    """
    asynchronous = _checkpointer(stepper, folder / "async", async_save=True)
    synchronous = _checkpointer(stepper, folder / "sync", async_save=False)
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    times = SaveTimes(state_bytes=sum(local(tensor).nbytes for tensor in tensors().values()))

    def save(checkpointer: Checkpointer) -> None:
        # As the trainer does. It also compares ranks, of which there is one here.
        assert not tensors.non_finite()
        checkpointer.save(stepper.state.step, tensors(), {})

    def save_async() -> None:
        stall_s = _seconds(lambda: save(asynchronous))
        for _ in range(_MAX_STEPS_PER_SAVE):
            times.step_while_saving_s.append(_step_seconds(stepper))
            stall_s += _seconds(asynchronous.poll)
            if not asynchronous.is_writing:
                break
        times.stall_s.append(stall_s + _seconds(asynchronous.finish))

    def save_sync() -> None:
        times.synchronous_s.append(_seconds(lambda: save(synchronous)))

    def take_steps(seconds: list[float], ratios: list[float]) -> None:
        for _ in range(undisturbed_steps):
            seconds.append(_step_seconds(stepper))
            if control is not None:
                ratios.append(seconds[-1] / control())

    for _ in range(_WARM_UP_STEPS):
        stepper.step()
        if control is not None:
            control()
    for _ in range(2 * rounds):
        take_steps(times.step_before_saves_s, times.control_before_saves)
    for index in range(rounds):
        for save_once in alternate([save_async, save_sync], index):
            save_once()
            take_steps(times.undisturbed_step_s, times.control_after_saves)
    latest = synchronous.latest
    assert latest is not None
    times.bytes_on_disk = sum(file.stat().st_size for file in latest.iterdir())
    times.parts_s = time_parts(folder / "parts", times.bytes_on_disk)
    return times


@contextmanager
def control_process(config: JobConfig) -> Iterator[Callable[[], float]]:
    """Yields a function that takes a training step in another process and returns its seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_take_steps_on_request, args=(config, theirs))
    process.start()
    theirs.close()

    def take_step() -> float:
        ours.send(True)
        seconds: float = ours.recv()
        return seconds

    try:
        yield take_step
    finally:
        # Closing the pipe is not enough: workers that read batches hold a copy of it.
        with suppress(BrokenPipeError):
            ours.send(False)
        process.join()


def _take_steps_on_request(config: JobConfig, requests: Connection) -> None:
    with temporary_world(), real_stepper(config) as stepper:
        while requests.recv():
            requests.send(_step_seconds(stepper))


def _checkpointer(stepper: Stepper, folder: Path, async_save: bool) -> Checkpointer:
    config = CheckpointConfig(async_save=async_save, keep_latest=1, resume=RESUME_NEVER)
    world = stepper.world
    return Checkpointer(
        folder,
        config,
        identity={},
        metadata={},
        is_main=world.is_main,
        group=world.host_group,
        background_group=world.new_host_group(),
    )


def _seconds(function: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    function()
    return time.perf_counter() - began_at


def _step_seconds(stepper: Stepper) -> float:
    def step() -> None:
        stepper.step()
        stepper.world.synchronize()

    return _seconds(step)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder on the file system to measure, for temporary files (default: the system's)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=4,
        help="saves of each kind; an even number is fair (default: 4)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=5,
        help="steps without a save after each save (default: 5)",
    )


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    (config,) = load_sides([options.config], overrides, num_ranks=1).values()
    with (
        temporary_world(),
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        real_stepper(config) as stepper,
        # A second model may not fit on a GPU.
        control_process(config) if stepper.world.device.type == "cpu" else nullcontext() as control,
    ):
        times = time_saves(stepper, Path(folder), options.rounds, options.steps, control)
    record: dict[str, JsonValue] = {
        "synchronous_s": float(np.median(times.synchronous_s)),
        "stall_s": float(np.median(times.stall_s)),
        "ratio": float(np.median(times.stall_s) / np.median(times.synchronous_s)),
        "each_synchronous_s": list(times.synchronous_s),
        "each_stall_s": list(times.stall_s),
        "step_before_saves_s": float(np.median(times.step_before_saves_s)),
        "undisturbed_step_s": float(np.median(times.undisturbed_step_s)),
        "step_while_saving_s": float(np.median(times.step_while_saving_s)),
        "control_before_saves": list(times.control_before_saves),
        "control_after_saves": list(times.control_after_saves),
        "speed_after_saves": times.speed_after_saves,
        "parts_s": dict(times.parts_s),
        "bytes_on_disk": times.bytes_on_disk,
        "state_bytes": times.state_bytes,
    }
    return Measurement(_table(times), record)


def _table(times: SaveTimes) -> list[str]:
    rows: list[tuple[str, ...]] = [("s", "lowest-highest", "ratio", "")]
    for name, seconds, reference in (
        ("synchronous save", times.synchronous_s, times.synchronous_s),
        ("training time lost to an asynchronous save", times.stall_s, times.synchronous_s),
        ("step before the first save", times.step_before_saves_s, times.step_before_saves_s),
        ("step after a save", times.undisturbed_step_s, times.step_before_saves_s),
        ("step during an asynchronous save", times.step_while_saving_s, times.step_before_saves_s),
    ):
        median = np.median(seconds)
        rows.append(
            (
                f"{median:.4g}",
                f"{min(seconds):.4g}-{max(seconds):.4g}",
                f"{median / np.median(reference):.3f}",
                name,
            )
        )
    on_disk, state = times.bytes_on_disk, times.state_bytes
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in times.parts_s.items())
    return [
        *aligned(rows),
        f"the bytes of a save by themselves: {parts}; each has two checksums, one of them when it "
        "is read back",
        f"{on_disk / 2**20:.1f} MiB on disk for {state / 2**20:.1f} MiB of state: "
        f"{on_disk / state:.4f}",
        f"steps after saves run at {times.speed_after_saves:.3f} of the speed before the first one",
    ]


CHECKPOINT = Command(
    name="checkpoint",
    summary="time synchronous and asynchronous saves",
    description="Runs training steps, and saves checkpoints synchronously and asynchronously in "
    "alternation. Prints the training time lost and the size of a checkpoint on disk.",
    add_arguments=_add_arguments,
    measure=_measure,
)
