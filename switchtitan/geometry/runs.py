"""The checkpoints of a run, as dense weights."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.checkpoint import CheckpointMetadata, find_all, read_metadata
from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.progress import progress_bar
from switchtitan.spectra.runs import model_differences
from switchtitan.spectra.spectrum import select_layers
from switchtitan.spectra.weight_change import linear_layers


@dataclass(frozen=True)
class Run:
    """A run's checkpoints, of one model."""

    label: str
    folder: Path
    metadata: CheckpointMetadata
    """Of the newest checkpoint."""
    checkpoints: dict[int, DenseCheckpoint]
    """By step, oldest first."""

    @property
    def steps(self) -> list[int]:
        """The checkpoints' steps, oldest first."""
        return list(self.checkpoints)

    @property
    def newest(self) -> DenseCheckpoint:
        """The newest checkpoint."""
        return self.checkpoints[self.steps[-1]]

    @property
    def model(self) -> ModelConfig:
        """The plain model's section."""
        return self.newest.config

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self.newest.shapes)

    @property
    def consecutive_steps(self) -> list[tuple[int, int]]:
        """Every checkpoint but the last, with the next one."""
        return list(zip(self.steps[:-1], self.steps[1:], strict=True))

    def layers(self, patterns: Sequence[str]) -> list[str]:
        """Returns the linear layers in the blocks that match a pattern; see `select_layers`.

        Raises:
            ConfigError: if a pattern matches none.
        """
        blocks = self.newest.prepared_model().blocks()
        return select_layers(linear_layers(self.newest.shapes, blocks), patterns)

    def read(self, step: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns some dense fp32 weights of a checkpoint, on the CPU.

        Raises:
            CheckpointError: if one cannot be read, or has a value that is not finite.
        """
        weights = self.checkpoints[step].read(names)
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{self.folder}, step {step}: {name} has values that are not finite; choose "
                    "earlier checkpoints with --steps"
                )
        return weights

    def read_all(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """Returns all dense fp32 weights of a checkpoint, on `device`."""
        names = self.names
        bar = progress_bar(f"{self.label}: reading", names, total=len(names), unit="tensors")
        return {name: self.read(step, [name])[name].to(device) for name in bar}


def open_run(label: str, path: Path, steps: Collection[int] | None = None) -> Run:
    """Opens all complete checkpoints of the run at `path`, or the given checkpoint alone.

    Args:
        steps: only those of these steps; by default all.

    Raises:
        CheckpointError: if there is none, or one is of another model than the newest.
        ConfigError: if `steps` names none of them.
    """
    found = {read_metadata(checkpoint).step: checkpoint for checkpoint in find_all(path)}
    chosen = [step for step in found if steps is None or step in steps]
    if not chosen:
        raise ConfigError(
            f"--steps {' '.join(map(str, steps or []))}: {path} has no such checkpoint; it has "
            f"{', '.join(map(str, found))}"
        )
    checkpoints = {step: DenseCheckpoint(found[step]) for step in chosen}
    newest = checkpoints[chosen[-1]]
    for step, checkpoint in checkpoints.items():
        if checkpoint.shapes != newest.shapes:
            raise CheckpointError(
                f"{found[step]}: its model has other shapes than that of "
                f"{found[chosen[-1]].name}; leave it out with --steps"
            )
    return Run(label, path, read_metadata(found[chosen[-1]]), checkpoints)


def common_steps(run: Run, other: Run) -> list[int]:
    """Returns the steps of which both runs have a checkpoint.

    Raises:
        ConfigError: if there is none, or the runs cannot be compared, because their models or
            corpora differ.
    """
    both = f"{run.folder} and {other.folder}"
    if differing := model_differences(run.model, other.model):
        raise ConfigError(
            f"--against: {both} hold different models ([model] {'; '.join(differing)}); choose "
            "runs of one model"
        )
    corpora = [one.metadata.identity_value("corpus", "fingerprint") for one in (run, other)]
    if corpora[0] != corpora[1]:
        raise ConfigError(
            f"--against: {both} were trained on different corpora ({corpora[0]} and "
            f"{corpora[1]}), so their tokens may differ; choose runs on one corpus"
        )
    steps = [step for step in run.steps if step in other.checkpoints]
    if not steps:
        raise ConfigError(
            f"--against: {both} have no checkpoint of the same step: "
            f"{', '.join(map(str, run.steps))} and {', '.join(map(str, other.steps))}"
        )
    return steps
