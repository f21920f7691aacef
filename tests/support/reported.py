"""Folders of runs with made-up results, to report on."""

import json
import math
from pathlib import Path

from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.tensorboard import TensorBoardWriter

NUM_STEPS = 60
CONFIG = """
[job]
name = "{name}"
[method]
name = "switchlora"
rank = {rank}
[training]
steps = {num_steps}
dtype = "float32"
"""


def losses_at(step: int, final: float) -> dict[str, float]:
    """The metrics of a step of a run whose loss falls to about `final`."""
    loss = final + 4 * math.exp(-step / 12) + 0.05 * math.sin(3 * step)
    return {
        "loss/train": loss,
        "optimizer/lr": 1e-2 * min(1, step / 10),
        "optimizer/grad_norm": 0.5 + 0.3 * math.cos(step),
        "throughput/tokens_per_s": 1000.0 + step,
        "memory/peak_gib": 1.5,
        "data/tokens_seen": 128.0 * step,
    }


def write_curves(folder: Path, final: float, num_steps: int = NUM_STEPS) -> None:
    """Writes the event file of a run."""
    writer = TensorBoardWriter(folder / TENSORBOARD_FOLDER, 0)
    for step in range(1, num_steps + 1):
        values = losses_at(step, final)
        if step % 10 == 0:
            validation = values["loss/train"] + 0.1
            values |= {"loss/validation": validation, "perplexity/validation": math.exp(validation)}
            values |= {"switch/candidate_coverage": step / 100}
        writer.write(step, values)
    writer.close()


def results(final: float, step: int = NUM_STEPS) -> dict[str, object]:
    """The contents of a finished run's `results.json`."""
    return {
        "step": step,
        "tokens_seen": 128 * step,
        "loss/validation": final + 0.1,
        "loss/test": final + 0.2,
        "bits_per_byte/validation": (final + 0.1) / 2,
        "bits_per_byte/test": (final + 0.2) / 2,
        "throughput/tokens_per_s": 1234.5,
        "throughput/wall_time_s": 95.0,
        "memory/peak_gib": 1.5,
        "memory/state_gib": 0.5,
        "compute_dtype": "float32",
        "device": "CPU",
        "cpu_capability": "AVX2",
        "num_ranks": 2,
        "num_threads": 1,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2"},
        "corpus": {"name": "c", "fingerprint": "f"},
        "num_parameters": {"trainable": 1_370_000, "frozen": 800_000, "buffers": 3},
    }


def write_run(folder: Path, final: float = 3.0, rank: int = 8, name: str = "run") -> Path:
    """Writes the folder of a finished run."""
    write_curves(folder, final)
    config = CONFIG.format(name=name, rank=rank, num_steps=NUM_STEPS)
    (folder / "config.toml").write_text(config)
    (folder / "results.json").write_text(json.dumps(results(final)))
    return folder
