"""A long run with saves, evaluations, switches and spectra holds no more at its end."""

import json
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from support.fault_report import IS_LONG, record
from support.ranks import run_on_ranks
from support.soak import RISES, Sampler, Slope, rising, slopes
from support.tiny import tiny_trainer

NUM_STEPS = {1: 3000, 2: 1000} if IS_LONG else {1: 140}
"""By the number of ranks."""
INTERVAL = 20
"""Steps between two saves and between two samples."""


class Leaks:
    """A hook that keeps some of everything before each sample."""

    def __init__(self, output_dir: Path) -> None:
        self._checkpoints = output_dir / "checkpoints"
        self._end = threading.Event()
        self._memory: list[bytearray] = []
        self._tensors: list[torch.Tensor] = []
        self._files: list[int] = []

    def around(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def is_due(self, step: int) -> bool:
        return step % INTERVAL == 0

    def after(self, step: int) -> None:
        self._memory.append(bytearray(os.urandom(4 << 20)))
        self._tensors.append(torch.ones(1 << 14).share_memory_())
        self._tensors += [torch.ones(1) for _ in range(3)]
        self._files.append(os.open(os.devnull, os.O_RDONLY))
        threading.Thread(target=self._end.wait, daemon=True).start()
        self._checkpoints.mkdir(exist_ok=True)
        (self._checkpoints / f"left-{step}").write_bytes(bytes(20_000))

    def results(self) -> dict[str, float | None]:
        return {}

    def close(self) -> None:
        self._end.set()
        for descriptor in self._files:
            os.close(descriptor)


def soak(rank: int, folder: Path, num_ranks: int, num_steps: int, leaks: bool, file: Path) -> None:
    """Trains, and writes the slopes of this rank's process."""
    keys = {
        "training.steps": num_steps,
        "checkpoint.interval": INTERVAL,
        "checkpoint.keep_latest": 2,
        "checkpoint.async_save": "true",
        "evaluation.interval": INTERVAL,
        "spectrum.interval": INTERVAL,
        "metrics.tensorboard": "true",
        "parallelism.check_interval": INTERVAL // 2,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    trainer = tiny_trainer(folder, "switchlora", *words, num_ranks=num_ranks)
    sampler, leaking = Sampler(trainer, folder / "run", INTERVAL), Leaks(folder / "run")
    trainer.hooks.extend([leaking, sampler] if leaks else [sampler])  # type: ignore[attr-defined]
    trainer.train()
    leaking.close()
    assert len(sampler.samples) == num_steps // INTERVAL
    found = slopes(sampler.samples, max(num_steps // 3, 3 * INTERVAL))
    Path(f"{file}-{rank}").write_text(json.dumps([found, sampler.samples]))


def run_soak(
    corpora: Path, name: str, num_ranks: int, num_steps: int, leaks: bool = False
) -> list[dict[str, Slope]]:
    """Returns the slopes of all ranks. Each runs in a new process."""
    folder = corpora / name
    folder.mkdir()
    file = folder / "slopes"
    run_on_ranks(num_ranks, soak, folder, num_ranks, num_steps, leaks, file)
    of_ranks = [json.loads(Path(f"{file}-{rank}").read_text())[0] for rank in range(num_ranks)]
    return [{name: Slope(*slope) for name, slope in found.items()} for found in of_ranks]


@pytest.mark.parametrize("num_ranks", NUM_STEPS)
def test_what_a_run_holds_does_not_grow(corpora: Path, num_ranks: int) -> None:
    num_steps = NUM_STEPS[num_ranks]
    for found in run_soak(corpora, f"soak-{num_ranks}", num_ranks, num_steps):
        assert not rising(found), found
        for name, slope in found.items():
            record(
                "soak",
                holds=name.replace("_", " "),
                num_ranks=num_ranks,
                per_1000_steps=slope.per_1000_steps,
                greatest_rise=slope.rise,
                bound=f"{RISES[name]:g}" if name in RISES else "grows by design",
            )


def test_planted_leaks_are_found(corpora: Path) -> None:
    (found,) = run_soak(corpora, "soak-leaks", 1, 120, leaks=True)
    assert set(rising(found)) == RISES.keys(), found
