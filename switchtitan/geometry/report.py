"""What was measured, as tables and as plain values."""

from collections.abc import Sequence
from dataclasses import asdict

from switchtitan.geometry.activations import Similarity, mean_similarity
from switchtitan.geometry.landscape import Barrier
from switchtitan.geometry.matrices import MatrixGeometry
from switchtitan.geometry.measure import Geometry, Options, Sharpness
from switchtitan.geometry.spectral import WeightGeometry
from switchtitan.json_values import finite_or_none
from switchtitan.spectra.spectrum import NUMERICAL_RANK_THRESHOLD

_SPECTRAL_TITLES = (
    f"rank {NUMERICAL_RANK_THRESHOLD:.0%}",
    "effective",
    "of full",
    "stable",
    "gap",
    "norm",
    "of |W|",
)
_SPECTRAL_FORMATS = (".1f", ".1f", ".3f", ".2f", ".3f", ".4g", ".4f")


Row = Sequence[str]


def tables(measured: Sequence[Geometry]) -> str:
    """Returns a table for each part that was measured, with means over layers, directions and
    blocks; then what was left out, and why."""
    parts = [
        _spectral_table(measured),
        _sharpness_table(measured),
        _barrier_table(measured),
        _activation_table(measured),
        "\n".join(
            f"{geometry.run.label}: {part} left out: {reason}"
            for geometry in measured
            for part, reason in geometry.left_out.items()
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def as_json(measured: Sequence[Geometry], options: Options) -> dict[str, object]:
    """Returns all numbers, by layer, direction, point and block; None where one is not finite."""
    return {
        "settings": asdict(options) | {"rank_threshold": NUMERICAL_RANK_THRESHOLD},
        "runs": [finite_or_none(_run_as_json(geometry)) for geometry in measured],
    }


def _run_as_json(geometry: Geometry) -> dict[str, object]:
    run = geometry.run
    record: dict[str, object] = {
        "run": run.label,
        "folder": str(run.folder),
        "method": run.metadata.identity_value("method", "name"),
        "steps": run.steps,
        "tokens": geometry.num_tokens,
        "left_out": geometry.left_out,
    }
    if geometry.spectral is not None:
        for key in ("weights", "updates", "updates_since_first"):
            record[key] = [_weights_as_json(one) for one in getattr(geometry.spectral, key)]
    if geometry.sharpness is not None:
        record["sharpness"] = asdict(geometry.sharpness) | {
            "mean_random": geometry.sharpness.mean_random
        }
    if geometry.barriers is not None:
        record["barriers"] = [
            {"from_step": first, "step": second, **found._asdict()}
            for (first, second), found in geometry.barriers.items()
        ]
    if geometry.barriers_to_other is not None:
        record["barriers_to_other"] = [
            {"step": step, **found._asdict()} for step, found in geometry.barriers_to_other.items()
        ]
    if geometry.activations is not None:
        record["activations"] = [
            {
                "step": step,
                "mean": mean_similarity(list(blocks.values()))._asdict(),
                "blocks": {name: found._asdict() for name, found in blocks.items()},
            }
            for step, blocks in geometry.activations.items()
        ]
    return record


def _weights_as_json(geometry: WeightGeometry) -> dict[str, object]:
    def plain(matrix: MatrixGeometry) -> dict[str, float]:
        numbers = matrix._asdict()
        if geometry.from_step is None:
            del numbers["relative_norm"]  # of a weight to itself
        return numbers

    steps = {"step": geometry.step}
    if geometry.from_step is not None:
        steps = {"from_step": geometry.from_step, **steps}
    return {
        **steps,
        "mean": plain(geometry.mean),
        "layers": {name: plain(matrix) for name, matrix in geometry.layers.items()},
    }


def _spectral_table(measured: Sequence[Geometry]) -> str:
    rows: list[Row] = [("mean over layers", "steps", *_SPECTRAL_TITLES)]
    for geometry in measured:
        if geometry.spectral is None:
            continue
        for symbol, found in (
            ("W", geometry.spectral.weights),
            ("dW", geometry.spectral.updates),
            ("dW", geometry.spectral.updates_since_first),
        ):
            rows += [(f"{geometry.run.label} {symbol}", *_spectral_cells(one)) for one in found]
    return _aligned(rows)


def _spectral_cells(found: WeightGeometry) -> list[str]:
    cells = [format(*pair) for pair in zip(found.mean, _SPECTRAL_FORMATS, strict=True)]
    if found.from_step is None:
        cells[-1] = ""
    return [_steps(found.from_step, found.step), *cells]


def _sharpness_table(measured: Sequence[Geometry]) -> str:
    rows: list[Row] = [
        ("sharpness", "step", "loss", "random (lowest-highest)", "principal (variance)")
    ]
    rows += [
        (geometry.run.label, *_sharpness_cells(geometry.sharpness))
        for geometry in measured
        if geometry.sharpness is not None
    ]
    return _aligned(rows)


def _sharpness_cells(found: Sharpness) -> list[str]:
    lowest, highest = min(found.random), max(found.random)
    principal = ", ".join(
        f"{value:.5f} ({share:.0%})"
        for value, share in zip(found.principal, found.principal_shares, strict=True)
    )
    return [
        str(found.step),
        f"{found.loss:.4f}",
        f"{found.mean_random:.5f} ({lowest:.5f}-{highest:.5f})",
        principal or "-",
    ]


def _barrier_table(measured: Sequence[Geometry]) -> str:
    rows: list[Row] = [("barrier", "steps", "height", "at", "loss there", "loss at the ends")]
    for geometry in measured:
        for (first, second), found in (geometry.barriers or {}).items():
            rows.append((geometry.run.label, _steps(first, second), *_barrier_cells(found)))
        for step, found in (geometry.barriers_to_other or {}).items():
            label = f"{geometry.run.label}, to the other run"
            rows.append((label, str(step), *_barrier_cells(found)))
    return _aligned(rows)


def _barrier_cells(found: Barrier) -> list[str]:
    there = found.losses[found.positions.index(found.position)]
    return [
        f"{found.height:.5f}",
        f"{found.position:.2f}",
        f"{there:.4f}",
        f"{found.losses[0]:.4f}, {found.losses[-1]:.4f}",
    ]


def _activation_table(measured: Sequence[Geometry]) -> str:
    rows: list[Row] = [("activations", "step", "block", "linear CKA", "cosine", "relative L2")]
    for geometry in measured:
        for step, blocks in (geometry.activations or {}).items():
            mean = mean_similarity(list(blocks.values()))
            *_, last = blocks
            named = [("mean", mean), (last, blocks[last])]
            rows += [
                (geometry.run.label, str(step), name, *_similarity_cells(found))
                for name, found in named
            ]
    return _aligned(rows)


def _similarity_cells(found: Similarity) -> list[str]:
    return [f"{number:.4f}" for number in found]


def _steps(first: int | None, second: int) -> str:
    return str(second) if first is None else f"{first}-{second}"


def _aligned(rows: Sequence[Row]) -> str:
    """Returns lines with the first column left and the others right; nothing for a title alone."""
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    )
