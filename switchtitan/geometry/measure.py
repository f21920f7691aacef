"""Measure a run's geometry: which parts can be measured, and all their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from switchtitan.contracts import Batch
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.world import device_type
from switchtitan.errors import ConfigError
from switchtitan.geometry.activations import Similarity, compare_activations
from switchtitan.geometry.directions import (
    perturbed_names,
    principal_directions,
    random_direction,
    scaled_to_weights,
)
from switchtitan.geometry.landscape import Barrier, Weights, barrier, expected_sharpness
from switchtitan.geometry.runs import Run, common_steps
from switchtitan.geometry.spectral import SpectralGeometry, spectral_geometry
from switchtitan.geometry.tokens import (
    LossOnTokens,
    counting,
    load_model,
    num_targets,
    validation_batches,
)
from switchtitan.progress import progress_bar

PARTS = {
    "weights": "spectra of each linear layer's weight, in each checkpoint",
    "updates": "spectra of its change between checkpoints, and since the first",
    "sharpness": "rise of the loss around the newest checkpoint",
    "barriers": "rise of the loss between checkpoints, and to the other run",
    "activations": "similarity of each block's output to the other run's",
}
"""Part -> what it measures."""
PRINCIPAL = "principal directions"
"""A piece of a part that needs more checkpoints."""
_TOO_FEW_FOR_PRINCIPAL = (
    "{} has less than 3 checkpoints ({}); keep more with [checkpoint] interval and keep_latest"
)
FORWARD_PARTS = ("sharpness", "barriers", "activations")
"""Parts that run the model."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[str, ...] | None
    """Keys of `PARTS`; None for all that the given runs allow."""
    layers: tuple[str, ...] = ("*",)
    num_tokens: int = 32768
    num_random: int = 5
    """Random directions."""
    num_principal: int | None = None
    """Principal directions; None for two, or none if the run has less than three checkpoints."""
    offsets: tuple[float, ...] = (0.01, 0.02, 0.05)
    """How far to move, as shares of the weights' norm."""
    num_points: int = 5
    """Points between two checkpoints."""
    seed: int = 0


DEFAULT_NUM_PRINCIPAL = 2


@dataclass(frozen=True)
class Sharpness:
    """The expected sharpness of the newest checkpoint; see `expected_sharpness`."""

    step: int
    loss: float
    """Without an offset."""
    random: list[float]
    """Along each random direction."""
    principal: list[float]
    """Along each principal direction of the run's checkpoints."""
    principal_shares: list[float]
    """The share of the checkpoints' variance along each of these."""

    @property
    def mean_random(self) -> float:
        """The mean over random directions."""
        return sum(self.random) / len(self.random)


@dataclass
class Geometry:
    """What was measured of a run."""

    run: Run
    num_tokens: int | None = None
    """Tokens of the validation split; None if the model was not run."""
    spectral: SpectralGeometry | None = None
    sharpness: Sharpness | None = None
    barriers: dict[tuple[int, int], Barrier] | None = None
    """By the steps of two consecutive checkpoints."""
    barriers_to_other: dict[int, Barrier] | None = None
    """To the other run, by the step of both."""
    activations: dict[int, Mapping[str, Similarity]] | None = None
    """Against the other run: step -> block -> similarity."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Part, or a piece of one -> why it was not measured."""


@dataclass(frozen=True)
class Prepared:
    """What to measure of a run, after all checks."""

    run: Run
    other: Run | None
    options: Options
    parts: tuple[str, ...]
    """Keys of `PARTS`."""
    layers: list[str]
    """Linear layers with spectra; empty if none are measured."""
    batches: list[Batch]
    """Tokens of the validation split; empty if no part runs the model."""
    left_out: dict[str, str]
    """Part, or a piece of one -> why it is not measured."""


def prepare(run: Run, other: Run | None, options: Options) -> Prepared:
    """Checks what to measure of a run, and reads its tokens. Measures nothing, which takes hours.

    Raises:
        ConfigError: if a part that was asked for cannot be measured, the other run cannot be
            compared, a pattern matches no layer, or there are too few tokens.
        CorpusError: if the run's corpus cannot be read, or has changed.
    """
    left_out = _left_out(run, other, options)
    parts = tuple(part for part in options.parts or PARTS if part not in left_out)
    has_spectra = "weights" in parts or "updates" in parts
    return Prepared(
        run,
        other,
        options,
        parts,
        layers=run.layers(options.layers) if has_spectra else [],
        batches=validation_batches(run, options.num_tokens)
        if set(parts) & set(FORWARD_PARTS)
        else [],
        left_out=left_out,
    )


def _left_out(run: Run, other: Run | None, options: Options) -> dict[str, str]:
    """Returns what cannot be measured and was not asked for, with the reason."""
    obstacles = {}
    if len(run.steps) < 2:
        obstacles["updates"] = (
            f"{run.folder} has one checkpoint, step {run.steps[0]}, and an update is between two; "
            "keep more with [checkpoint] interval and keep_latest"
        )
        if other is None:
            obstacles["barriers"] = (
                f"{run.folder} has one checkpoint, step {run.steps[0]}; keep more with "
                "[checkpoint] interval and keep_latest, or pass --against RUN"
            )
    if other is None:
        obstacles["activations"] = "they are compared with another run's; pass --against RUN"
    else:
        common_steps(run, other)
    for part, reason in obstacles.items():
        if options.parts is not None and part in options.parts:
            raise ConfigError(f"--parts {part}: {reason}")
    left_out = obstacles if options.parts is None else {}
    num_principal = _most_principal(run)
    if num_principal == 0 and (options.parts is None or "sharpness" in options.parts):
        left_out[PRINCIPAL] = _TOO_FEW_FOR_PRINCIPAL.format(run.folder, len(run.steps))
    if options.num_principal is not None and options.num_principal > num_principal:
        reason = left_out.get(PRINCIPAL) or (
            f"{run.folder} has {len(run.steps)} checkpoints, so at most {num_principal} principal "
            "directions; lower it"
        )
        raise ConfigError(f"--principal {options.num_principal}: {reason}")
    return left_out


def measure(prepared: Prepared) -> Geometry:
    """Measures the chosen parts of a run.

    Raises:
        CheckpointError: if a checkpoint cannot be read.
    """
    run, other, options = prepared.run, prepared.other, prepared.options
    parts, batches = prepared.parts, prepared.batches
    found = Geometry(run, left_out=prepared.left_out)
    if prepared.layers:
        found.spectral = spectral_geometry(
            run, prepared.layers, of_weights="weights" in parts, of_updates="updates" in parts
        )
    if not batches:
        return found
    device = torch.device(device_type())
    use_full_precision(device.type)
    found.num_tokens = num_targets(batches)
    loss = LossOnTokens(run.model, batches, device)
    if "sharpness" in parts:
        found.sharpness = measure_sharpness(run, loss, options, device)
    if "barriers" in parts:
        _measure_barriers(found, other, loss, options, device)
    if "activations" in parts:
        assert other is not None
        found.activations = _activations(run, other, batches, device)
    return found


def measure_sharpness(
    run: Run, loss: LossOnTokens, options: Options, device: torch.device
) -> Sharpness:
    """Measures the newest checkpoint, along random and principal directions."""
    step = run.steps[-1]
    weights = run.read_all(step, device)
    principal = _principal_directions(run, weights, options)
    total = 1 + 2 * len(options.offsets) * (options.num_random + len(principal))
    with progress_bar(f"{run.label}: sharpness", total=total, unit="losses") as bar:
        counted = counting(loss, bar)
        loss_here = counted(weights)

        def along(direction: Weights) -> float:
            return expected_sharpness(counted, weights, direction, options.offsets, loss_here)

        return Sharpness(
            step=step,
            loss=loss_here,
            random=[
                along(random_direction(weights, options.seed, number))
                for number in range(options.num_random)
            ],
            principal=[along(direction) for direction, _ in principal],
            principal_shares=[share for _, share in principal],
        )


def _principal_directions(
    run: Run, weights: Weights, options: Options
) -> Sequence[tuple[Weights, float]]:
    count = options.num_principal
    if count is None:
        count = min(DEFAULT_NUM_PRINCIPAL, _most_principal(run))
    if count == 0:
        return []
    names = perturbed_names(weights)
    found = principal_directions(
        lambda name: [run.read(step, [name])[name] for step in run.steps], names, count
    )
    return [
        (scaled_to_weights(principal.direction, weights), principal.share) for principal in found
    ]


def _most_principal(run: Run) -> int:
    """Returns the number of principal directions of the run's checkpoints; 0 for less than three.

    Two points have one, but it is only the line between them.
    """
    return len(run.steps) - 1 if len(run.steps) > 2 else 0


def _measure_barriers(
    found: Geometry,
    other: Run | None,
    loss: LossOnTokens,
    options: Options,
    device: torch.device,
) -> None:
    run = found.run
    shared = [] if other is None else common_steps(run, other)
    total = (len(run.consecutive_steps) + len(shared)) * (options.num_points + 2)
    with progress_bar(f"{run.label}: barriers", total=total, unit="losses") as bar:
        counted = counting(loss, bar)
        found.barriers = {
            (first, second): barrier(
                counted,
                run.read_all(first, device),
                run.read_all(second, device),
                options.num_points,
            )
            for first, second in run.consecutive_steps
        }
        if other is not None:
            found.barriers_to_other = {
                step: barrier(
                    counted,
                    run.read_all(step, device),
                    other.read_all(step, device),
                    options.num_points,
                )
                for step in shared
            }


def _activations(
    run: Run, other: Run, batches: Sequence[Batch], device: torch.device
) -> dict[int, Mapping[str, Similarity]]:
    steps = common_steps(run, other)
    total = len(steps) * len(batches)
    found: dict[int, Mapping[str, Similarity]] = {}
    with progress_bar(f"{run.label}: activations", total=total, unit="batches") as bar:

        def counted() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                bar.update()

        for step in steps:
            models = [load_model(run.model, one.read_all(step, device)) for one in (run, other)]
            found[step] = compare_activations(models[0], models[1], counted(), device)
    return found
