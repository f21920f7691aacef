"""Finished runs of a declared comparison, with made-up results and without checkpoints."""

import json
from collections.abc import Callable, Sequence

from switchtitan.comparison.comparison import Comparison, ComparisonState
from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run
from switchtitan.config import resolved_toml

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


def finish(run: Run, validation_loss: float, test_loss: float = 9.0, **other: object) -> None:
    """Writes configuration and results of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.toml").write_text(resolved_toml(run.config()))
    losses = {"loss/validation": validation_loss, "loss/test": test_loss}
    (run.folder / "results.json").write_text(json.dumps(RESULTS | losses | other))


def state_of(comparison: ComparisonConfig) -> ComparisonState:
    """The state of a comparison whose runs are finished in their folders, or in declared files."""
    return Comparison(comparison, comparison.output_dir / "no report").state()


def finish_due(
    comparison: ComparisonConfig, loss_of: Callable[[Run], float], **other: object
) -> Sequence[Run]:
    """Finishes the runs of the current stage; test losses are 1 more than validation losses."""
    runs = state_of(comparison).due
    for run in runs:
        finish(run, loss_of(run), loss_of(run) + 1, **other)
    return runs
