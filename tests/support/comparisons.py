"""A declared comparison of three rows on the tiny configuration, and made-up results."""

import json
import math

from support.tiny import tiny_toml
from switchtitan.config import flatten, resolved_toml
from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.tensorboard import TensorBoardWriter
from switchtitan.workbench.comparison.comparison import follow
from switchtitan.workbench.comparison.runs import RunResult, config_sha256

GRID = """
name = "two"
config = "base.toml"
output_dir = "{folder}/out"
selection_seed = 1
report_seeds = [2, 3]
baseline = "dense"
[[rows]]
name = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
set.method = {{ name = "full_rank" }}
[[rows]]
name = "thin"
learning_rates = [1e-2, 2e-2, 4e-2]
set.method = {{ name = "lora", rank = 4 }}
[[rows]]
name = "thin-balanced"
learning_rate_of = "thin"
set.method = {{ name = "lora", rank = 4, alpha = 1, init = "balanced" }}
"""
LR = "optimizer.lr"
HEIGHT = {"dense": 1.0, "thin": 2.0, "thin-balanced": 1.5}
RESULTS = {
    "step": 40,
    "tokens_seen": 5120,
    "bits_per_byte/validation": 1.25,
    "bits_per_byte/test": 1.5,
    "throughput/tokens_per_s": 100.0,
    "memory/peak_gib": 1.5,
    "memory/state_gib": 0.5,
    "device": "CPU",
    "cpu_capability": "AVX2",
    "num_threads": 1,
    "versions": {"torch": "2"},
    "commit": "abc",
    "corpus": {"name": "c", "fingerprint": "f"},
    "num_parameters": {"trainable": 7},
}
"""The contents of `results.json` of a finished run, without its losses."""


def write_grid(folder, grid=GRID, changes=None):
    """Writes the file that declares a comparison, and its base.

    Args:
        changes: parts of the base -> their replacements, next to those of every comparison.
    """
    fitting = {
        "[evaluation]": "[evaluation]\ntest_tokens = 160",
        "num_workers = 0": "num_workers = 0\ntest_fraction = 0.1",
        "tensorboard = false": "tensorboard = true",
    }
    base = tiny_toml(folder / "runs", "full_rank", fitting | (changes or {}))
    (folder / "base.toml").write_text(base)
    file = folder / "grid.toml"
    file.write_text(grid.format(folder=folder))
    return file


def loss_of(run, dense=0.002, thin=0.02):
    """A loss that increases with the distance to the row's best rate, slightly with the seed."""
    ratio = run.tuned[LR] / (dense if run.row == "dense" else thin)
    return HEIGHT[run.row] + max(ratio, 1 / ratio) / 10 + 0.001 * run.seed


def result_of(run, validation_loss, test_loss):
    """A made-up result."""
    losses = {"loss/validation": validation_loss, "loss/test": test_loss}
    own = {"row": run.row, "seed": run.seed, "config_sha256": config_sha256(run.config)}
    return RunResult.model_validate(flatten(RESULTS) | losses | own)


def train(config, losses):
    """Follows a comparison to its end; returns its state, and the runs of each stage.

    Args:
        losses: validation and test loss of a run.
    """
    results = {}
    stages = []
    while due := follow(config, results.get).due:
        assert not results.keys() & set(due), "no run is trained twice"
        results |= {run: result_of(run, *losses(run)) for run in due}
        stages.append(due)
    return follow(config, results.get), stages


def write_curves(folder, final, num_steps=60):
    """Writes the event file of a run whose loss falls to about `final`."""
    writer = TensorBoardWriter(folder / TENSORBOARD_FOLDER, 0)
    for step in range(1, num_steps + 1):
        loss = final + 4 * math.exp(-step / 12)
        writer.write(step, {"loss/train": loss, "data/tokens_seen": 128.0 * step})
    writer.write(num_steps, {"loss/validation": final + 0.1})


def finish(run, validation_loss, test_loss=9.0, **other):
    """Writes configuration and results of a run into its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.toml").write_text(resolved_toml(run.config))
    losses = {"loss/validation": validation_loss, "loss/test": test_loss}
    (run.folder / "results.json").write_text(json.dumps(RESULTS | losses | other))


def finish_all(comparison, loss=loss_of):
    """Finishes all due runs; test losses are 1 more than validation losses."""
    while due := comparison.state().due:
        for run in due:
            finish(run, loss(run), loss(run) + 1)
    return comparison.state()
